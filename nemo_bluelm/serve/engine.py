"""From requests to batches: those that wait, those that the model works on, and their way back to the server."""

import asyncio
import random
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING

from nemo_bluelm.generate.request import Piece
from nemo_bluelm.serve.errors import ApiError, shutting_down
from nemo_bluelm.serve.schema import Asked

if TYPE_CHECKING:
    from nemo_bluelm.generate.generator import Generator


class Job:
    """A request on its way. Its pieces come from the engine's thread; the server's loop, which made it, takes them.

    What waits here is at most the reply itself, so the engine never waits for a client.

    Attributes:
        over: nothing more will come, or nobody waits for it.
    """

    def __init__(self, asked: Asked):
        self.asked, self.over = asked, False
        self._unfinished = asked.sampling.samples
        self._waiting: deque[Piece | ApiError | None] = deque()
        self._ready = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def put(self, piece: Piece) -> None:
        """Called by the engine."""
        if piece.reply is None and not self.asked.stream:
            return
        self._add(piece)
        self._unfinished -= piece.reply is not None
        if not self._unfinished:
            self.end()

    def end(self, error: ApiError | None = None) -> None:
        """The last call, from either thread."""
        self.over = True
        self._add(error)

    def _add(self, item: Piece | ApiError | None) -> None:
        self._waiting.append(item)
        self._loop.call_soon_threadsafe(self._ready.set)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """The pieces, each time all that have come since the last.

        Raises:
            ApiError: there will be no reply, or no more of it.
        """
        while True:
            await self._ready.wait()
            self._ready.clear()
            found: list[Piece] = []
            while self._waiting:
                item = self._waiting.popleft()
                if isinstance(item, Piece):
                    found.append(item)
                    continue
                if found:
                    yield found
                if item is not None:
                    raise item
                return
            if found:
                yield found


class Engine:
    """The queue before a generator.

    Args:
        max_batch: replies that are written together.
        max_tokens: of them, prompts and new tokens.
    """

    def __init__(self, max_batch: int, max_tokens: int):
        self._max_batch, self._max_tokens = max_batch, max_tokens
        self._queue: deque[Job] = deque()
        self._running: list[Job] = []
        self._closed = False
        self._changed = threading.Condition()

    @property
    def closed(self) -> bool:
        return self._closed

    def submit(self, job: Job) -> None:
        """Let a request wait for its turn."""
        with self._changed:
            if self._closed:
                raise shutting_down()
            self._queue.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Forget a request: it leaves the queue, or its batch before the next token."""
        if not job.over:
            job.end()
        with self._changed:
            if job in self._queue:
                self._queue.remove(job)

    def close(self) -> None:
        """Give up what waits and runs; :meth:`run` returns."""
        with self._changed:
            self._closed = True
            for job in (*self._queue, *self._running):
                if not job.over:
                    job.end(shutting_down())
            self._changed.notify()

    def run(self, generator: "Generator") -> None:
        """Write replies until the engine is closed, in the calling thread, which is the one that made ``generator``."""
        while not self._closed:
            self._serve(self._next_batch(), generator)

    def _serve(self, batch: list[Job], generator: "Generator") -> None:
        try:
            self._write(batch, generator)
        except Exception:  # requests were checked before: a bug, or the GPU's memory; the next batch may do
            traceback.print_exc()
            for job in batch:
                if not job.over:
                    job.end(ApiError(500, "generation failed; the server's log tells why", "generation_failed"))

    def _next_batch(self) -> list[Job]:
        """The request that waits longest, and others that are to be sampled alike; none if the engine is closed."""
        with self._changed:
            self._running = []
            while not self._queue and not self._closed:
                self._changed.wait()
            if self._closed:
                return []
            first = self._queue.popleft()
            self._running = [first]
            longest = first.asked.tokens + first.asked.sampling.max_new_tokens
            for job in () if first.asked.alone else tuple(self._queue):
                together = max(longest, job.asked.tokens + job.asked.sampling.max_new_tokens)
                if not job.asked.alone and job.asked.sampling.alike(first.asked.sampling) and self._fits(together):
                    self._running.append(job)
                    self._queue.remove(job)
                    longest = together
            return self._running

    def _fits(self, longest: int) -> bool:
        """Whether one more request fits into the batch if its longest prompt and reply have so many tokens."""
        replies = (len(self._running) + 1) * self._running[0].asked.sampling.samples
        return replies <= self._max_batch and replies * longest <= self._max_tokens

    @staticmethod
    def _write(batch: list[Job], generator: "Generator") -> None:
        if not batch:
            return
        asked = batch[0].asked
        seed = random.getrandbits(32) if asked.seed is None else asked.seed
        samples = asked.sampling.samples
        prompts = [job.asked.prompt for job in batch]
        samplings = [replace(job.asked.sampling, seed=seed) for job in batch]
        for piece in generator.stream(prompts, samplings, dropped=lambda index: batch[index // samples].over):
            job = batch[piece.index // samples]
            if not job.over:
                job.put(replace(piece, index=piece.index % samples))
