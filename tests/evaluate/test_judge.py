"""The judge: its verdict, and answers that stay unscored because it says nothing usable."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nemo_bluelm.evaluate.scorers import judge, make_scorers

FIELDS = {"question": "Where is it?", "answer": ["Paris", "France"]}


class Endpoint(ThreadingHTTPServer):
    """Says what it was told to, and keeps what it was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: list = []  # texts of the judge, or (status, body)
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(content)
        self.server.keys.append(self.headers.get("Authorization"))
        reply = self.server.replies.pop(0)
        if isinstance(reply, str):
            reply = 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]})
        status, body = reply
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr(judge, "_BACKOFF", 0.01)
    server = Endpoint()
    yield server
    server.shutdown()
    server.server_close()


def make(url, **options):
    (made,) = make_scorers({"judge": {"base_url": url, "model": "a judge", "timeout": 2.0, **options}}, "test")
    return made


@pytest.mark.parametrize(
    "reply, value",
    [
        ("Score: 1", 1),
        ("It is a note, not a no.\n**Score:** 0.5", 0.5),
        ('{"score": 0}', 0),
        ("Score: 0\nNo, wait.\nScore: 1", 1),
        ("Score: 1.", 1),
        ("Score: 0.85.", 0.85),
        ("**Score: 1**.", 1),
        ("### Score: `.5`", 0.5),
        ('```json\n{\n  "score": 1\n}\n```', 1),
        ("得分如下\nScore：0.5。", 0.5),
        ("Score: 1\nThat is my score.", 1),
        ("Wrong.\nScore: 1 out of 10", None),
        ("Score: 1\nScore: 1 of 10", None),
        ("Score: 1\nOr rather score: 0", None),
        ("Score: 1%", None),
        ("Score: 1, but let me check", None),
        ("Score: 1 or 0", None),
        ("Score: 1e-3", None),
        ("Score: 0,5", None),
        ("Score: 1..", None),
        ("Score: .", None),
        ("Score: nan", None),
        ("Score: 7", None),
        ("Score: -1", None),
        ("Score: 8/10", None),
        ("It is right.", None),
        ("", None),
    ],
)
def test_a_verdict(endpoint, reply, value):
    endpoint.replies = [reply]
    score = make(endpoint.url).score("in Paris", FIELDS)
    assert score.value == value and (value is not None or (score.passing and "no score" in score.reason))


@pytest.mark.parametrize("reason, value", [("length", None), ("stop", 1), (None, 1)])
def test_a_reply_that_was_cut_is_no_verdict(endpoint, reason, value):
    choice = {"finish_reason": reason, "message": {"content": "I think\nScore: 1"}}
    endpoint.replies = [(200, json.dumps({"choices": [choice]}))]
    score = make(endpoint.url, max_tokens=9).score("in Paris", FIELDS)
    assert score.value == value and (value is not None or (score.passing and "cut at 9 tokens" in score.reason))


def test_what_is_asked(endpoint, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    endpoint.replies = ["Score: 1"] * 2
    made = make(endpoint.url, api_key_env="A_KEY")
    made.score("in {{ question }} Paris", FIELDS)
    (message,) = endpoint.asked[0]["messages"]
    assert endpoint.asked[0]["model"] == "a judge" and endpoint.keys == ["Bearer secret"]
    for text in ("Where is it?", "Paris\nFrance", "in {{ question }} Paris"):
        assert text in message["content"]
    make(endpoint.url, prompt="{{ said }}|{{ reference }}").score("x", {"answer": "y"})
    assert endpoint.asked[1]["messages"][0]["content"] == "x|y"


def test_failures_that_pass_are_tried_again(endpoint):
    endpoint.replies = [(500, ""), (429, ""), "Score: 1"]
    assert make(endpoint.url).score("x", FIELDS).value == 1


@pytest.mark.parametrize("reply", [(200, "no JSON"), (200, "[]"), (200, '{"choices": []}'), (401, "no key"), (400, "")])
def test_what_is_no_reply_leaves_the_answer_unscored(endpoint, reply):
    endpoint.replies = [reply]
    score = make(endpoint.url).score("x", FIELDS)
    assert score.value is None and score.passing and len(endpoint.asked) == 1


def test_nobody_there():
    """Asked a few times, then no more: an evaluation must not wait for each of thousands of answers."""
    server = Endpoint()
    server.shutdown()
    server.server_close()
    made = make(server.url, retries=0)
    reasons = [made.score("x", FIELDS) for _ in range(6)]
    assert all(score.value is None and score.passing for score in reasons)
    assert "can't be asked (ConnectError" in reasons[0].reason and "does not answer" in reasons[-1].reason


def test_it_is_asked_again_after_a_while(endpoint, monkeypatch):
    """Training goes on for days; a judge that was down for an hour is not out for good."""
    made = make(endpoint.url, retries=0)
    endpoint.replies = [(500, "")] * 4 + ["Score: 1"] * 2
    assert all(made.score("x", FIELDS).value is None for _ in range(6)) and len(endpoint.asked) == 4
    monkeypatch.setattr(made, "_ask_again", 0.0)
    assert made.score("x", FIELDS).value == made.score("x", FIELDS).value == 1


def test_a_template_that_the_record_can_not_fill(endpoint):
    score = make(endpoint.url, prompt="{{ qestion }}").score("x", FIELDS)
    assert score.value is None and "did you mean question" in score.reason and not endpoint.asked
