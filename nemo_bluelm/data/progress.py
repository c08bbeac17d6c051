"""What a program that isn't watched on a terminal says while it indexes."""

import sys
import time

_INTERVAL = 10  # seconds


class Lines:
    """A line on stderr now and then; the ``progress`` of :func:`nemo_bluelm.data.index.build_index`."""

    def __init__(self):
        self._started = self._last = time.monotonic()
        self._known: int | None = None

    def __call__(self, done: int, shards: int, samples: int) -> None:
        """``done`` of ``shards`` shards are indexed, and ``samples`` samples so far."""
        now = time.monotonic()
        if self._known is None:
            self._known = samples  # indexed before
        if now - self._last < _INTERVAL:
            return
        self._last = now
        rate = (samples - self._known) / (now - self._started)
        text = f"indexing: {done:,} of {shards:,} shards, {samples:,} samples, {rate:,.0f} samples/s"
        print(text, file=sys.stderr, flush=True)
