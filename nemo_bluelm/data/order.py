"""The order in which a source's samples are drawn: a pure function of (seed, epoch, position), computed in place."""

import hashlib
from functools import lru_cache

import numpy as np

_ROUNDS = 8


class Permutation:
    """A pseudo-random bijection of range(size) that needs no memory and no replay: any element costs the same.

    A balanced Feistel network (Luby and Rackoff 1988) over the next power of four; what falls outside the range is
    enciphered again until it falls inside (cycle walking, Black and Rogaway 2002), three more times on average at most.

    Args:
        size: number of elements, 1 or more.
        key: what the order depends on, such as (seed, name, epoch).
    """

    def __init__(self, size: int, *key: object):
        self._size = size
        self._half = np.uint64(max(1, (max(1, size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = np.frombuffer(hashlib.sha512(repr(key).encode()).digest(), "<u8", _ROUNDS)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Elements at ``positions`` (int64 [n], each in range(size)), as int64 [n]."""
        values = self._encipher(positions.astype(np.uint64))
        while (outside := values >= self._size).any():
            values[outside] = self._encipher(values[outside])
        return values.astype(np.int64)

    def _encipher(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


_permutation = lru_cache(64)(Permutation)


class SourceOrder:
    """The endless sequence of a source's samples; ``factors`` says how often each comes in an epoch.

    A sample with factor 2.25 comes twice in every epoch and a third time in a quarter of them. The epoch's length never
    changes: of each group with one factor, as many samples get the extra turn in one epoch as in the next, and the
    turn goes round.

    Args:
        factors: float [n], 0 or more; not all of them 0.

    Attributes:
        epoch_length: draws in an epoch.
    """

    def __init__(self, seed: int, name: str, factors: np.ndarray):
        self._seed, self._name = seed, name
        self._groups = []
        for factor in np.unique(factors):
            members = np.flatnonzero(factors == factor)
            if len(members) == len(factors):
                members = range(len(factors))  # the usual case, for which no array need be kept
            whole = int(factor) * len(members)
            extra = round((factor - int(factor)) * len(members))
            # However few they are, samples that shall come at all come some day.
            self._groups.append((members, whole, extra or int(factor > 0 and not whole)))
        self._starts = np.cumsum([0, *(whole + extra for _, whole, extra in self._groups)])
        self.epoch_length = int(self._starts[-1])

    def draw(self, start: int, count: int) -> np.ndarray:
        """Samples at the positions from ``start`` on, int64; ``count`` of them or fewer, to the end of an epoch."""
        epoch, first = divmod(start, self.epoch_length)
        slots = np.arange(first, min(first + count, self.epoch_length))
        slots = _permutation(self.epoch_length, self._seed, self._name, epoch)(slots)
        samples = np.empty_like(slots)
        for group, (members, whole, extra) in enumerate(self._groups):
            mine = (slots >= self._starts[group]) & (slots < self._starts[group + 1])
            offsets = slots[mine] - self._starts[group]
            drawn = _take(members, offsets % len(members))
            laps, places = np.divmod(offsets - whole + epoch * extra, len(members))  # counted over all epochs
            for lap in np.unique(laps[offsets >= whole]):
                turn = (offsets >= whole) & (laps == lap)
                order = _permutation(len(members), self._seed, self._name, "extra", group, int(lap))
                drawn[turn] = _take(members, order(places[turn]))
            samples[mine] = drawn
        return samples


def _take(members: np.ndarray | range, places: np.ndarray) -> np.ndarray:
    return places if isinstance(members, range) else members[places]
