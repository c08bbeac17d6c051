"""Training goes on with a judge that fails for three calls of ten, and with one that ends in the middle of it."""

import hashlib
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import fmean

import pytest

from tests.rl.grpo_runs import beginner, command, curve, forks, write_recipe  # noqa: F401

pytestmark = pytest.mark.slow

ENOUGH = 40  # replies that the judge which ends has answered


def chance(asked: str) -> int:
    """From 0 to 255; a question has the same one every time."""
    return hashlib.sha256(asked.encode()).digest()[0]


class _Judge(BaseHTTPRequestHandler):
    """Of ten answers one is an error, one garbage, one no number in the range; others depend on the question."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        self.server.asked += 1
        fate = chance(asked) % 10
        content = {3: "Score: 10000", 5: "\x00 yes"}.get(fate, f"Score: {chance(asked[::-1]) / 255:.3f}")
        body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        ended = self.server.ends and self.server.asked > ENOUGH
        self.send_response(500 if ended or fate == 7 else 200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(params=[False, True], ids=["fails now and then", "ends"])
def judge(request):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
    server.asked, server.ends = 0, request.param
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_training_goes_on(judge, corpus, beginner, forks, tmp_path):  # noqa: F811
    url = f"http://127.0.0.1:{judge.server_port}/v1"
    options = f"base_url: '{url}', model: m, timeout: 5, retries: 0, prompt: 'reply {{{{ said }}}}'"
    recipe = write_recipe(tmp_path, f"{{judge: {{weight: 0.5, {options}}}, hashed: {{weight: 0.5}}}}")
    told = forks.run(
        *command(recipe, corpus, beginner, tmp_path / "run", "train.steps=5", "environments.digits.num_workers=2")
    )
    rows = curve(tmp_path / "run")
    assert len(rows) == 5 and all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    shares = [row["env/problems/unscorable_rate"] for row in rows]
    if judge.ends:
        assert shares[-1] == 1 and rows[-1]["grad_norm"] == 0, "nobody can tell, so nothing is learnt"
        assert "  problems: " in told and "replies have no reward" in told
    else:
        assert 0.1 < fmean(shares) < 0.6 and all(row["grad_norm"] > 0 for row in rows)
