"""The server by HTTP: what it answers, whom it refuses, and that no client harms another."""

import contextlib
import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nemo_bluelm.generate.request import Prompt, Sampling
from tests.serve.conftest import chat, data_url, picture

PICTURES = [picture(56, 56, 10), picture(120, 40, 90), picture(30, 90, 200)]


def expected(generator, text, *images, think=None, **sampling):
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    (reply,) = generator.generate([Prompt([{"role": "user", "content": content}], images, think)], Sampling(**sampling))
    return reply


@pytest.fixture(scope="module")
def generator(tiny_checkpoint):
    from nemo_bluelm.generate.generator import open_generator

    with open_generator(tiny_checkpoint) as generator:
        yield generator


def events(response) -> list[dict]:
    """Of a stream, which must end as one does."""
    lines = [line for line in response.read().decode().split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("images", [(), PICTURES[:2]])
@pytest.mark.parametrize("think", [True, False, None])
def test_a_reply_is_the_generators(server, generator, think, images):
    fields = {"think": think, **({} if think is False else {"think_budget": 5}), "logprobs": True}
    status, body = server.ask(chat("what is seven?", *images, max_tokens=14, **fields))
    reply = expected(generator, "what is seven?", *images, think=think, max_new_tokens=14, think_budget=5)
    (choice,) = body["choices"]
    assert status == 200
    message = {"role": "assistant", "content": reply.answer, "reasoning_content": reply.thought}
    assert choice["message"] == message and choice["finish_reason"] == "length"
    assert body["usage"] == {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": 14,
        "total_tokens": reply.prompt_tokens + 14,
        "completion_tokens_details": {"reasoning_tokens": 5 if think else 0},
    }
    logprobs = choice["logprobs"]
    assert (len(logprobs["reasoning_content"]), len(logprobs["content"])) == ((5, 7) if think else (0, 14))
    given = [token["logprob"] for token in logprobs["reasoning_content"] + logprobs["content"]]
    tags = (generator.tokenizer.think, generator.tokenizer.think_end)
    written = [logprob for logprob, token in zip(reply.logprobs, reply.tokens) if token not in tags]
    assert given == pytest.approx(written, abs=1e-4)


def test_a_stream_is_the_whole_in_pieces(server):
    asked = chat("nine?", PICTURES[0], max_tokens=40, think=True, think_budget=9, n=2, seed=5)
    asked |= {"temperature": 1.0, "logprobs": True}
    _, whole = server.ask(asked)
    response = server.send(asked | {"stream": True, "stream_options": {"include_usage": True}})
    assert response.status == 200 and response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response)
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        for name in ("content", "reasoning_content"):
            assert "".join(c["delta"].get(name, "") for c in mine) == choice["message"][name]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        assert mine[-1]["logprobs"] == choice["logprobs"]
    assert whole["choices"][0]["message"] != whole["choices"][1]["message"]


def test_seeds(server):
    asked = chat("nine?", max_tokens=12) | {"temperature": 1.0}
    texts = [
        server.ask(asked | {"seed": seed})[1]["choices"][0]["message"]["content"] for seed in (1, 1, 2, None, None)
    ]
    assert texts[0] == texts[1] and len(set(texts)) == 4


def test_a_conversation_goes_on(server, generator):
    turns = [
        {"role": "user", "content": "seven?"},
        {"role": "assistant", "content": "nine", "reasoning_content": "a number", "refusal": None},
        {"role": "user", "content": "a word?"},
    ]
    _, body = server.ask({"messages": turns, "temperature": 0, "max_tokens": 8, "think": False})
    kept = [turns[0], {"role": "assistant", "content": "nine", "thinking": "a number"}, turns[2]]
    (reply,) = generator.generate([Prompt(kept)], Sampling(max_new_tokens=8))
    assert body["choices"][0]["message"]["content"] == reply.answer
    assert body["usage"]["prompt_tokens"] == reply.prompt_tokens


def test_models_and_health(server):
    status, body = server.get("/v1/models")
    assert status == 200 and [model["id"] for model in body["data"]] == ["tiny_sft"]
    assert server.get("/v1/models", key="another")[0] == 401
    assert server.get("/health", key="none") == (200, {"status": "ok", "requests": 0})
    assert server.get("/v1/nothing")[0] == 404
    assert server.get("/v1/chat/completions")[0] == 405


def part(url):
    content = [{"type": "image_url", "image_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": content}]}


BROKEN = picture(56, 56)[:90]  # its header is whole
HELLO = {"role": "user", "content": "hello"}
REFUSED = [
    (b"", "invalid_json", "not valid JSON"),
    (b"[]", "invalid_json", "JSON object"),
    (b'{"messages": ', "invalid_json", "not valid JSON"),
    (b"\xff\xfe\x00", "invalid_json", "not valid JSON"),
    (b"[" * 100_000, "invalid_json", "not valid JSON"),
    (b'{"messages": [], "temperature": NaN}', "invalid_json", "NaN"),
    (b'{"messages": [], "seed": ' + b"9" * 5000 + b"}", "invalid_json", "digits"),
    ({}, None, "messages must be"),
    ({"messages": "hello"}, None, "messages must be"),
    ({"messages": [3]}, None, "messages[0]"),
    ({"messages": [{"role": "system", "content": "x"}]}, None, "'system'"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, None, "user first"),
    ({"messages": [HELLO, HELLO]}, None, "in turns"),
    ({"messages": [{"role": "user", "content": None}]}, None, "content of a user message"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, None, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "Unicode"),
    ({"messages": [HELLO | {"name": "me"}]}, "unknown_field", "'name'"),
    (chat("x", foo=1), "unknown_field", "'foo'"),
    (chat("x", tools=[{}]), "unsupported_field", "tools"),
    (chat("x", frequency_penalty=0.5), "unsupported_field", "frequency_penalty"),
    (chat("x", temperature="hot"), None, "temperature"),
    (chat("x", temperature=-1), None, "temperature"),
    (chat("x", top_p=0), None, "top_p"),
    (chat("x", max_tokens=0), None, "max_tokens"),
    (chat("x", max_tokens=True), None, "max_tokens"),
    (chat("x", n=33), None, "n is 33"),
    (chat("x", stop=[""]), None, "stop"),
    (chat("x", stop={}), None, "stop"),
    (chat("x", stop=0), None, "stop"),
    (chat("x", think=False, think_budget=5), None, "think_budget changes nothing"),
    (chat("x", stream_options={"include_usage": True}), None, "stream_options changes nothing"),
    (chat("x", max_tokens=3, max_completion_tokens=4), None, "names of one limit"),
    (chat("x", think="yes"), None, "think"),
    (chat("x", think=True, max_tokens=2), None, "max_tokens is 2; a thought"),
    (chat("x", think_budget=-1), None, "think_budget"),
    (chat("x", max_tokens=4096), "context_length_exceeded", "the context 4,096"),
    (chat("x " * 4096, max_tokens=1), "context_length_exceeded", "the context 4,096"),
    (chat("x" * 600_000), "context_length_exceeded", "at least"),
    (chat("x", n=32, max_tokens=4090), "context_length_exceeded", "room for 65,536"),
    (part("https://example.com/cat.png"), "invalid_image_url", "nothing is fetched"),
    (part("file:///etc/passwd"), "invalid_image_url", "nothing is fetched"),
    (part("data:image/png;base64,!!!"), "invalid_image", "base64"),
    (part(data_url(b"not an image")), "invalid_image", "not an image"),
    (part(data_url(BROKEN)), None, "does not decode"),
    (part(data_url(picture(4, 4))), "invalid_image", "a side is below"),
    (part(data_url(picture(1200, 1000))), "image_too_large", "more than 1,000,000"),
    (part(data_url(bytes(1_100_000))), "image_too_large", "more than 1,048,576 bytes"),
    (chat("x", *PICTURES, PICTURES[0]), "too_many_images", "more than 3 images"),
]


@pytest.mark.parametrize("body, code, text", REFUSED, ids=range(len(REFUSED)))
def test_bad_requests(server, body, code, text):
    status, answer = server.ask(body)
    error = answer["error"]
    assert (status, error["type"], error["code"]) == (400, "invalid_request_error", code), error
    assert text in error["message"] and "\n" not in error["message"]


def test_refused_by_their_headers(server):
    assert server.ask(chat("x"), Authorization="Bearer another key")[0] == 401
    assert server.ask(chat("x"), Authorization="")[1]["error"]["code"] == "invalid_api_key"
    assert server.ask(chat("x"), Content_Type="text/plain")[0] == 415
    status, body = server.ask(chat("x", model="gpt"))
    assert (status, body["error"]["code"]) == (404, "model_not_found")


def test_large_bodies(server):
    assert server.ask(b" " * (2 << 20) + b"{}")[0] == 413
    with server.connect() as connection:  # without a length
        head = server.head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        connection.sendall(head)
        with pytest.raises(OSError):  # the answer comes, and sooner or later the connection ends
            for _ in range(200):
                connection.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
                connection.settimeout(0.01)
                try:
                    if answer := connection.recv(100):
                        assert answer.startswith(b"HTTP/1.1 413")
                        raise ConnectionResetError
                except TimeoutError:
                    connection.settimeout(60)
    server.wait_until_idle(5)


def test_no_http_at_all(server):
    with server.connect() as connection:
        connection.sendall(b"hello\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_a_body_that_stalls(server):
    with server.connect() as connection:
        connection.sendall(server.head(100) + b'{"mess')
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_head_that_stalls(server):
    """Nothing at all, half a head, and half of a second request's; a whole request may take longer than they may."""
    health = b"GET /health HTTP/1.1\r\nHost: x\r\n"
    for first, rest in ((b"", b""), (b"", health), (health + b"\r\n", health)):
        with server.connect() as connection:
            connection.sendall(first)
            answer = b""
            while first and not answer.endswith(b"}"):
                answer += connection.recv(1000)
            connection.sendall(rest)
            start = time.monotonic()
            assert connection.recv(100) == b""
            assert 1 < time.monotonic() - start < 5
    body = json.dumps(chat("nine?", max_tokens=2000)).encode()
    with server.connect() as connection:
        connection.sendall(server.head(len(body)) + body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_a_full_queue(server):
    clients = [server.connect() for _ in range(210)]
    try:
        for client in clients:
            client.sendall(server.head(100))
        while server.get("/health")[1]["requests"] < 210:
            time.sleep(0.01)
        response = server.send(chat("x"))
        assert response.status == 429 and int(response.headers["retry-after"]) > 0
        assert json.loads(response.read())["error"]["code"] == "queue_full"
    finally:
        for client in clients:
            client.close()
    server.wait_until_idle(5)
    assert server.ask(chat("x", max_tokens=2))[0] == 200


def test_cancelled_clients_leave_nothing(server):
    """One who goes takes its place in the queue along, and what nobody waits for is not written on."""
    for stream in (True, False):
        for number in range(40):
            body = json.dumps(chat(f"nine {number}", max_tokens=4000, stream=stream)).encode()
            with server.connect() as client:
                client.sendall(server.head(len(body)) + body)
    start = time.monotonic()
    assert server.ask(chat("x", max_tokens=2))[0] == 200
    server.wait_until_idle(5)
    assert time.monotonic() - start < 8  # 4000 tokens alone take longer


def test_a_client_that_does_not_read(server):
    """Its reply doesn't hold up others', and it is cut off when it has read nothing for two seconds."""
    body = json.dumps(chat("nine?", max_tokens=400, n=8, stream=True, temperature=1.0, logprobs=True)).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", server.port))
        client.sendall(server.head(len(body)) + body)
        while not server.get("/health")[1]["requests"]:
            time.sleep(0.01)
        assert server.ask(chat("x", max_tokens=2))[0] == 200
        server.wait_until_idle(8)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := client.recv(65536):
                received += part
        assert received.startswith(b"HTTP/1.1 200") and b"[DONE]" not in received


def test_two_hundred_clients_with_images(server, generator):
    base = server.memory("VmRSS")
    answers = [expected(generator, "what is it?", image, max_new_tokens=16).answer for image in PICTURES]
    assert len(set(answers)) > 1

    def ask(number):
        return server.ask(chat("what is it?", PICTURES[number % len(PICTURES)], stream=False))

    with ThreadPoolExecutor(200) as pool:
        replies = list(pool.map(ask, range(200)))
    assert [status for status, _ in replies] == [200] * 200
    for number, (_, body) in enumerate(replies):
        assert body["choices"][0]["message"]["content"] == answers[number % len(answers)]
    assert server.memory("VmHWM") - base < 400
    assert server.get("/health")[1]["requests"] == 0


def test_sigterm_lets_what_was_accepted_end(server):
    """The last test of this server."""
    response = server.send(chat("nine?", max_tokens=400, stream=True))
    server.process.send_signal(signal.SIGTERM)
    statuses = []
    while not statuses or statuses[-1] == 200:  # the signal is on its way
        statuses.append(server.get("/health")[0])
    assert statuses[-1] == 503
    status, body = server.ask(chat("x"))
    assert (status, body["error"]["code"]) == (503, "shutting_down")
    assert events(response)[-1]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(10) == 0
