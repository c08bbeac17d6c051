"""Batches and their end, with the generator in this process: the engine where HTTP can't look into it."""

import asyncio
import threading
import time
from contextlib import contextmanager

import pytest

from nemo_bluelm.generate.request import Prompt, Sampling
from nemo_bluelm.serve.engine import Engine, Job
from nemo_bluelm.serve.errors import ApiError
from nemo_bluelm.serve.schema import Asked
from tests.serve.conftest import picture


class Recorded:
    """A generator that remembers how many prompts it was given together, and whose the pieces were that it gave."""

    def __init__(self, generator):
        self.generator, self.batches, self.pieces = generator, [], []

    def stream(self, prompts, sampling, dropped):
        self.batches.append(len(prompts))
        for piece in self.generator.stream(prompts, sampling, dropped):
            self.pieces.append(piece.index)
            yield piece


@pytest.fixture(scope="module")
def generator(tiny_checkpoint):
    from nemo_bluelm.generate.generator import open_generator

    with open_generator(tiny_checkpoint) as generator:
        yield generator


@pytest.fixture
def recorded(generator):
    return Recorded(generator)


@contextmanager
def server_loop():
    """A loop in a thread of its own, as the server's; the engine runs in this one."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def asked(text="seven?", images=(), seed=None, tokens=20, stream=False, **sampling):
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    prompt = Prompt([{"role": "user", "content": content}], images)
    return Asked(prompt, Sampling(**{"max_new_tokens": 4, **sampling}), seed, tokens, stream, False, False)


def serve(recorded, *requests, max_batch=32, max_tokens=10_000, on_piece=None):
    """What each request gets: its replies, or the error; the engine is closed when the last one is over."""
    engine = Engine(max_batch, max_tokens)

    async def client(job):
        replies = []
        try:
            async for pieces in job.pieces():
                if on_piece is not None:
                    on_piece(engine, job)
                replies += [piece.reply for piece in pieces if piece.reply is not None]
        except ApiError as error:
            return error
        return replies

    async def clients():
        jobs = [Job(request) for request in requests]
        for job in jobs:
            engine.submit(job)
        submitted.set()
        try:
            return await asyncio.gather(*map(client, jobs))
        finally:
            engine.close()

    submitted = threading.Event()
    with server_loop() as loop:
        results = asyncio.run_coroutine_threadsafe(clients(), loop)
        submitted.wait()
        engine.run(recorded)
        return results.result(10)


def test_those_that_are_sampled_alike_go_together(recorded):
    requests = [asked(f"{n}?") for n in range(4)]
    requests[2:2] = [asked("other?", top_k=3), asked("seeded?", seed=1, temperature=1.0), asked("greedy?", seed=1)]
    results = serve(recorded, *requests)
    assert recorded.batches == [5, 1, 1]
    for request, (reply,) in zip(requests, results):
        sampling = Sampling(**{**vars(request.sampling), "seed": request.seed or 0})
        assert reply.tokens == recorded.generator.generate([request.prompt], sampling)[0].tokens


def test_batches_have_limits(recorded):
    requests = [asked(f"{n}?", samples=2) for n in range(5)]
    assert [len(replies) for replies in serve(recorded, *requests, max_batch=5)] == [2] * 5
    assert recorded.batches == [2, 2, 1]
    # 6 x (30 + 4) tokens are more than 200, 4 x 34 are not
    serve(recorded, *(asked(f"{n}?", samples=2, tokens=20 + 10 * (n == 2)) for n in range(4)), max_tokens=200)
    assert recorded.batches[3:] == [3, 1]


def test_a_batch_without_clients_is_given_up(recorded):
    requests = [asked(f"{n}?", max_new_tokens=2000, stream=True, temperature=1.0) for n in range(2)]
    results = serve(recorded, *requests, on_piece=lambda engine, job: engine.cancel(job))
    assert results == [[], []] and len(recorded.pieces) < 200


def test_the_others_go_on_when_one_leaves(recorded):
    def leave(engine, job):
        if job.asked.stream:
            engine.cancel(job)

    requests = [asked(text, stream=text == "a", max_new_tokens=60, temperature=1.0) for text in "ab"]
    gone, replies = serve(recorded, *requests, on_piece=leave)
    assert gone == [] and len(replies) == 1 and recorded.batches == [2]
    assert 2 * recorded.pieces.count(0) < recorded.pieces.count(1)  # what nobody waits for is not written on


def test_closing_ends_what_runs_and_what_waits(recorded):
    def close(engine, job):
        engine.close()

    requests = [asked("a", max_new_tokens=2000, stream=True, temperature=1.0), asked("b", top_k=2)]
    start = time.monotonic()
    results = serve(recorded, *requests, on_piece=close)
    assert [error.status for error in results] == [503, 503] and recorded.batches == [1]
    assert time.monotonic() - start < 5


def test_a_failed_batch_is_not_the_last(recorded, capsys):
    """The server checks images before they come here."""
    failed, (reply,) = serve(recorded, asked("a", images=[picture(56, 56)[:90]]), asked("b", top_k=2))
    assert failed.status == 500 and len(reply.tokens) == 4
    assert "does not decode" in capsys.readouterr().err
