"""The plan: which samples go into which pack, from lengths alone. Pure integers, no files."""

import hashlib
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from nemo_bluelm.data.packs import padded_length

WINDOW = 32  # packs planned at a time: more pack better, and spread a sample's place in the stream wider


class Draw(NamedTuple):
    """One use of a sample: index of its source, how often the source had been through before, index in the source."""

    source: int
    epoch: int
    sample: int


@dataclass(frozen=True)
class PlanSource:
    """Lengths of one source: ``tokens[i]`` and ``tiles[i]`` of sample i. ``weight`` is its share by tokens."""

    name: str
    weight: float
    tokens: Sequence[int]
    tiles: Sequence[int]


@dataclass
class _OpenPack:
    tokens: int = 0  # padded
    tiles: int = 0
    draws: list[Draw] = field(default_factory=list)


class Plan:
    """An endless list of packs, a pure function of its arguments.

    - *Mixture*: the next sample comes from the source with the fewest tokens drawn relative to its weight, so
      every prefix is exact by tokens to within about one sample.
    - *Order*: each source goes through its samples in a permutation that depends on (seed, source, epoch) only.
    - *Packing*: best fit into the packs of a window; where nothing fits the oldest leaves it. Packs come out in
      the order they were opened: no sample waits long, and long ones don't overtake short ones, which would bend the
      mixture. A sample is never split, and no pack exceeds either cap.
    """

    def __init__(self, sources: Sequence[PlanSource], seed: int, token_cap: int, tile_cap: int, alignment: int = 1):
        self._sources = list(sources)
        self._seed, self._token_cap, self._tile_cap, self._alignment = seed, token_cap, tile_cap, alignment
        self._drawn = [0] * len(self._sources)  # samples
        self._tokens = [0] * len(self._sources)
        self._orders: list[np.ndarray] = [np.empty(0, np.int64)] * len(self._sources)
        self._window: deque[_OpenPack] = deque()  # by age
        self._packs: list[tuple[Draw, ...]] = []
        self._lock = threading.Lock()

    def pack(self, i: int) -> tuple[Draw, ...]:
        """The samples of pack ``i`` >= 0, in their order in the row."""
        if i < 0:
            raise IndexError(f"pack {i}")
        with self._lock:
            while len(self._packs) <= i:
                self._place(self._draw())
            return self._packs[i]

    def tokens_drawn(self) -> list[int]:
        """Tokens planned so far, by source."""
        return list(self._tokens)

    def _draw(self) -> Draw:
        s = min(range(len(self._sources)), key=lambda s: self._tokens[s] / self._sources[s].weight)
        source = self._sources[s]
        epoch, position = divmod(self._drawn[s], len(source.tokens))
        if position == 0:
            self._orders[s] = permutation(self._seed, source.name, epoch, len(source.tokens))
        draw = Draw(s, epoch, int(self._orders[s][position]))
        self._drawn[s] += 1
        self._tokens[s] += source.tokens[draw.sample]
        return draw

    def _place(self, draw: Draw) -> None:
        source = self._sources[draw.source]
        tokens, tiles = padded_length(source.tokens[draw.sample], self._alignment), source.tiles[draw.sample]
        fitting = [
            pack
            for pack in self._window
            if pack.tokens + tokens <= self._token_cap and pack.tiles + tiles <= self._tile_cap
        ]
        if fitting:
            pack = max(fitting, key=lambda pack: pack.tokens)
        else:
            if len(self._window) == WINDOW:
                self._packs.append(tuple(self._window.popleft().draws))
            pack = _OpenPack()
            self._window.append(pack)
        pack.tokens += tokens
        pack.tiles += tiles
        pack.draws.append(draw)


def permutation(seed: int, name: str, epoch: int, size: int) -> np.ndarray:
    """Order of a source's samples in one epoch, int64 [size].

    Sorted raw Philox numbers, not ``Generator.permutation``: numpy keeps raw bit streams stable over its versions.
    """
    source = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    bits = np.random.Philox(np.random.SeedSequence([seed, source, epoch])).random_raw(size)
    return np.argsort(bits, kind="stable")
