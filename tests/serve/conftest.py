"""A real server on loopback, of a tiny model with random weights, and a client for it."""

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import CHECKOUT
from tests.tiny_checkpoint import tiny_checkpoint  # noqa: F401

KEY = "a key"
LIMITS = "--max-queue 210 --max-body-mb 2 --max-images 3 --max-image-mb 1 --max-image-mpixels 1 --max-tokens 16"
LIMITS += " --max-batch-tokens 65536 --stall-timeout 2 --request-timeout 40 --grace 20 --api-key-env SERVE_KEY"


class Server:
    """``nemo-bluelm serve`` in a process of its own, and requests to it."""

    def __init__(self, checkpoint: Path, *flags: str):
        command = [sys.executable, "-m", "nemo_bluelm.cli.main", "serve", str(checkpoint), "--port", "0", *flags]
        env = {**os.environ, "SERVE_KEY": KEY, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, cwd=CHECKOUT, env=env, stdout=subprocess.PIPE, text=True)
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", self.process.stdout.readline())
        assert found, f"the server ended with {self.process.wait(10)}"
        self.port = int(found[1])

    def connect(self, timeout: float = 60) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def send(self, body: dict | bytes, **headers: str) -> http.client.HTTPResponse:
        """A chat request; the response's body is not yet read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes) else json.dumps(body)
        given = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", "/v1/chat/completions", content, given)
        return connection.getresponse()

    def ask(self, body: dict | bytes, **headers: str) -> tuple[int, dict]:
        response = self.send(body, **headers)
        return response.status, json.loads(response.read())

    def get(self, path: str, key: str = KEY) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def head(self, length: int) -> bytes:
        """The first lines of a chat request."""
        return (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {KEY}\r\nContent-Length: {length}\r\n\r\n"
        ).encode()

    def wait_until_idle(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (open_requests := self.get("/health")[1]["requests"]) and time.monotonic() < end:
            time.sleep(0.05)
        assert open_requests == 0

    def memory(self, field: str) -> int:
        """MiB of the process: VmRSS, or VmHWM for the most that it ever had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+)", status)[1]) // 1024

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tiny_checkpoint):  # noqa: F811
    server = Server(tiny_checkpoint, *LIMITS.split())
    yield server
    server.stop()


def picture(width: int, height: int, shade: int = 0) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (shade % 256, 80, 255 - shade % 256)).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def chat(text: str, *images: bytes, **fields) -> dict:
    """The body of a request."""
    content = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    return {"messages": messages, "temperature": 0, **fields}
