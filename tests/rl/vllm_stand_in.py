"""A server that answers as vLLM 0.32 does, from the folder that it is started on, by our generator.

``python vllm_stand_in.py FOLDER PORT_FILE``. What vLLM makes of the folder's weights is tested where vLLM is installed.
"""

import base64
import json
import shutil
import sys
import tempfile
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from nemo_bluelm.convert.importing import import_hf
from nemo_bluelm.generate.generator import open_generator
from nemo_bluelm.generate.request import Prompt, Sampling

FOLDER, PORT_FILE = map(Path, sys.argv[1:])
PLAIN = {"temperature", "top_p", "top_k", "repetition_penalty"}


class Engine:
    """One model, for one request at a time."""

    def __init__(self):
        self._lock, self._open = threading.Lock(), ExitStack()
        self.reload()

    def reload(self) -> None:
        with self._lock:
            self._open.close()
            place = Path(tempfile.mkdtemp())
            self._open.callback(shutil.rmtree, place)
            import_hf(FOLDER, place / "checkpoint")
            self._generator = self._open.enter_context(open_generator(place / "checkpoint"))

    def chat(self, body: dict) -> dict:
        assert body["return_token_ids"] and body["logprobs"] and body["model"] == "policy", body
        images, messages = [], []
        for message in body["messages"]:
            parts = [{"type": "text", "text": message["content"]}]
            if not isinstance(message["content"], str):
                parts = [self._part(part, images) for part in message["content"]]
            messages.append({"role": message["role"], "content": parts})
        extra = body["vllm_xargs"]
        assert bool(extra.get("think")) == body["chat_template_kwargs"]["enable_thinking"]
        sampling = Sampling(
            max_new_tokens=body["max_tokens"],
            seed=body["seed"],
            think_budget=extra.get("think_budget"),
            closing_text=extra["closing_text"],
            **{name: body[name] for name in PLAIN},
        )
        with self._lock:
            prompt = self._generator.encode(Prompt(messages, images, extra.get("think")))
            (reply,) = (piece.reply for piece in self._generator.stream_tokens([prompt], sampling) if piece.reply)
        scores = [{"token": "", "logprob": score, "bytes": None, "top_logprobs": []} for score in reply.logprobs]
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": reply.answer},
            "logprobs": {"content": scores},
            "finish_reason": "length" if reply.stop_reason == "length" else "stop",
            "stop_reason": None,
            "token_ids": list(reply.tokens),
        }
        return {"object": "chat.completion", "choices": [choice], "prompt_token_ids": list(prompt.tokens)}

    @staticmethod
    def _part(part: dict, images: list) -> dict:
        if part["type"] == "text":
            return part
        head, _, data = part["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        images.append(base64.b64decode(data))
        return {"type": "image"}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        assert self.path == "/v1/models"
        self._send({"object": "list", "data": [{"id": "policy", "object": "model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        if self.path == "/collective_rpc":
            assert body == {"method": "reload_weights"}
            engine.reload()
            self._send({"results": [None]})
        elif self.path in ("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"):
            self._send(None)
        else:
            assert self.path == "/v1/chat/completions"
            self._send(engine.chat(body))

    def _send(self, content):
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


engine = Engine()
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
PORT_FILE.write_text(str(server.server_port))
server.serve_forever()
