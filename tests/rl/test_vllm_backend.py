"""Rollouts by a vLLM server: weights go there, replies come back with what training needs, and mistakes are told."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nemo_bluelm.config.checks import check_recipe
from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.convert.engines import export_vllm
from nemo_bluelm.errors import UserError
from nemo_bluelm.generate.request import Prompt, Sampling, TokenPrompt
from nemo_bluelm.rl.backends import vllm_server
from nemo_bluelm.rl.backends.vllm import request
from nemo_bluelm.rl.backends.vllm_server import VllmServer
from nemo_bluelm.runtime.run_dir import resolve_checkpoint
from tests.rl.grpo_runs import beginner, command, curve, forks, write_recipe  # noqa: F401
from tests.runtime.processes import CHECKOUT

ENGINE = "NEMO_BLUELM_VLLM_PYTHON"  # a python that has vLLM
STAND_IN = Path(__file__).with_name("vllm_stand_in.py")
CLOSING = "so"
VLLM = "grpo.generation.backend=vllm"
ROPE = "model.language.yarn.original_max_position_embeddings=512"  # as the beginner's
VLLM = "grpo.generation.backend=vllm"


@pytest.fixture(scope="module")
def folder(beginner, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("export") / "vllm"
    export_vllm(resolve_checkpoint(str(beginner), "init_from"), out)
    return out


def started(command, **environment):
    paths = os.pathsep.join(filter(None, (environment.pop("path"), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(list(map(str, command)), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(done, process, seconds):
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None and time.monotonic() < end, "the server did not start"
        time.sleep(0.2)


@pytest.fixture
def stand_in(folder, tmp_path):
    port = tmp_path / "port"
    process = started([sys.executable, STAND_IN, folder, port], path=str(CHECKOUT))
    try:
        wait_for(lambda: port.exists() and port.read_text(), process, 120)
        yield f"http://127.0.0.1:{port.read_text()}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def engine(folder, tmp_path):
    """vLLM itself. Its CPU build multiplies by packed copies of weights, of which it forgets a tied head's when weights
    are reloaded; a plugin makes it do without."""
    plugin = tmp_path / "plugin"
    (plugin / "plain-0.dist-info").mkdir(parents=True)
    (plugin / "plain-0.dist-info" / "METADATA").write_text("Name: plain\nVersion: 0\n")
    (plugin / "plain-0.dist-info" / "entry_points.txt").write_text("[vllm.general_plugins]\nplain = plain:register\n")
    register = "def register():\n    import vllm._custom_ops\n    vllm._custom_ops._supports_onednn = False\n"
    (plugin / "plain.py").write_text(register)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = os.environ[ENGINE]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--trust-remote-code"]
    command += ["--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", 256, "--logits-processors", "bluelm_thinking:ThinkingBudget"]
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    process = started(command, path=os.pathsep.join((str(folder), str(plugin))), HF_HUB_OFFLINE="1", **settings)

    def answers():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(answers, process, 300)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def learn(url, folder, corpus, beginner, forks, tmp_path):  # noqa: F811
    words = [VLLM, f"grpo.generation.vllm.url={url}", f"grpo.generation.vllm.folder={folder}", ROPE, "train.steps=3"]
    words += ["grpo.thinking.budget_tokens=2", f"grpo.thinking.closing_text={CLOSING}", "optim.lr=0.01"]
    forks.run(*command(write_recipe(tmp_path), corpus, beginner, tmp_path / "run", *words))
    return curve(tmp_path / "run")


@pytest.mark.slow
def test_replies_are_of_the_weights_as_they_are(stand_in, folder, corpus, beginner, forks, tmp_path):  # noqa: F811
    """Steps of 0.01 change the weights much: replies of those before would have other log-probabilities."""
    rows = learn(stand_in, folder, corpus, beginner, forks, tmp_path)
    assert [row["mismatch/nan_rate"] for row in rows] == [0, 0, 0]
    for row in rows:
        assert row["mismatch/token_mult_prob_error"] == pytest.approx(1, abs=1e-4)
        assert row["rollout/thinking/think_length"] <= 2 and row["grad_norm"] > 0
    assert rows[0]["reward/mean"] != rows[2]["reward/mean"]
    assert not list(folder.parent.glob(".*")), "what was handed over is gone"


@pytest.mark.slow
def test_a_folder_of_another_model(stand_in, folder, corpus, beginner, forks, tmp_path):  # noqa: F811
    words = [VLLM, f"grpo.generation.vllm.url={stand_in}", f"grpo.generation.vllm.folder={folder}"]
    fork = forks.start(*command(write_recipe(tmp_path), corpus, beginner, tmp_path / "run", *words))
    code, output = fork.finish(timeout=240)
    assert code == 2 and "text_config.max_position_embeddings is 4096" in output and "or export again" in output


@pytest.mark.long
@pytest.mark.skipif(ENGINE not in os.environ, reason=f"{ENGINE} names no python that has vLLM")
def test_vllm_itself(engine, folder, corpus, beginner, forks, tmp_path):  # noqa: F811
    rows = learn(engine, folder, corpus, beginner, forks, tmp_path)
    print([row["mismatch/token_mult_prob_error"] for row in rows])
    for row in rows:
        assert row["mismatch/nan_rate"] == 0 and row["mismatch/token_mult_prob_error"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "place, complaint", [(None, "vLLM at http://127.0.0.1:9 can't be asked"), ("no", "no export for")]
)
def test_a_server_that_is_not_there(place, complaint, folder, corpus, beginner, forks, tmp_path):  # noqa: F811
    words = [VLLM, "grpo.generation.vllm.url=http://127.0.0.1:9", f"grpo.generation.vllm.folder={place or folder}"]
    fork = forks.start(*command(write_recipe(tmp_path), corpus, beginner, tmp_path / "run", *words))
    code, output = fork.finish(timeout=240)
    assert code == 2 and "Traceback" not in output, output
    assert any(line.startswith("nemo-bluelm: error: ") and complaint in line for line in output.splitlines())


ANSWER = {"prompt_token_ids": [1, 2], "choices": [{"token_ids": [3], "logprobs": {"content": [{"logprob": -1.5}]}}]}
ANSWERS = {
    "fine": (200, ANSWER, None),
    "no ids": (200, {**ANSWER, "choices": [{"logprobs": {"content": []}}]}, "return_token_ids"),
    "no prompt": (200, {"choices": ANSWER["choices"]}, "return_token_ids"),
    "fewer scores": (200, {**ANSWER, "choices": [{**ANSWER["choices"][0], "logprobs": {"content": []}}]}, "0 log-prob"),
    "a list": (200, [1], "not as vLLM does"),
    "text": (200, "<html>", "not as vLLM does"),
    "refused": (400, {"error": {"message": "max_tokens is too large"}}, "max_tokens is too large"),
    "not there": (404, {}, "VLLM_SERVER_DEV_MODE=1"),
    "broken": (500, {}, "can't be asked (HTTP 500"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_of_a_server(name, monkeypatch):
    status, content, complaint = ANSWERS[name]
    monkeypatch.setattr(vllm_server, "_PAUSE", 0.0)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(200, {"data": [{"id": "m"}]})

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self._send(status, content)

        def _send(self, code, found):
            self.send_response(code)
            self.end_headers()
            self.wfile.write((found if isinstance(found, str) else json.dumps(found)).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        client = VllmServer(f"http://127.0.0.1:{server.server_port}", 5)
        if complaint is None:
            assert client.chat({}) == ([1, 2], [3], [-1.5])
            return
        with pytest.raises(UserError) as error:
            client.chat({})
        assert complaint in str(error.value) and "\n" not in str(error.value)
    finally:
        server.shutdown()
        server.server_close()


def test_a_request_depends_on_seed_and_number():
    asked = Prompt(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}], [b"png"], True
    )
    prompt = TokenPrompt([1], None, True, asked=asked)
    bodies = [request(prompt, Sampling(seed=seed, think_budget=0), number) for seed in (1, 2) for number in (5, 6)]
    assert len({body["seed"] for body in bodies}) == 4
    image, text = bodies[0]["messages"][0]["content"]
    assert image["image_url"]["url"] == "data:image/png;base64,cG5n" and text == {"type": "text", "text": "What?"}
    assert bodies[0]["vllm_xargs"] == {"closing_text": "", "think": True, "think_budget": 0}


HERE = "grpo.generation.vllm.url=http://h:1 grpo.generation.vllm.folder=f"


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (VLLM, ["grpo.generation.vllm.url is None", "http://localhost:8000"]),
        (f"{VLLM} grpo.generation.vllm.url=http://h:1", ["grpo.generation.vllm.folder", "export vllm"]),
        (f"{VLLM} {HERE} grpo.generation.temperature=0.7", ["grpo.generation.temperature is 0.7", "must be 1"]),
        (f"{VLLM} {HERE} grpo.generation.vllm.timeout=0", ["grpo.generation.vllm.timeout"]),
        (f"{VLLM} {HERE} train.lora.rank=4", ["train.lora.rank"]),
        (HERE, ["grpo.generation.backend is mcore"]),
    ],
)
def test_keys_that_can_not_be(overrides, parts, tmp_path):
    with pytest.raises(UserError) as error:
        check_recipe(load_recipe(str(write_recipe(tmp_path)), [*overrides.split(), "init_from=there"]), None)
    assert [part for part in parts if part not in str(error.value)] == []
