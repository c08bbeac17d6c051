"""What can be drawn from one source: lengths and tiles of its samples, after exclusion, splitting and size limits."""

import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nemo_bluelm.data.index import Index, Sample, ShardIndex
from nemo_bluelm.errors import UserError

OVERSIZE = ("drop", "truncate", "error")
LARGEST_WEIGHT = 1e9
MOST_EPOCHS = 1e6
LARGEST_FACTOR = 1e3


@dataclass(frozen=True)
class Source:
    """One part of the mixture.

    Args:
        shards: names in the index, or globs over them.
        weight: share of the mixture by tokens; shares are divided by their sum.
        max_epochs: leave the mixture after going through the samples this often; None goes on without end.
        resample: tag -> how often a sample with it comes in an epoch, where samples without come once. Of several
            tags the largest factor counts; 0 leaves a sample out.
    """

    shards: Sequence[str]
    weight: float = 1.0
    max_epochs: float | None = None
    resample: Mapping[str, float] = field(default_factory=dict)

    def check(self, name: str) -> None:
        """
        Raises:
            UserError: a number that can't be; ``name`` is the source's.
        """
        key = f"data.sources.{name}"
        if not 0 < self.weight <= LARGEST_WEIGHT or self.weight < 1 / LARGEST_WEIGHT:
            raise UserError(
                f"{key}.weight is {self.weight}; it must be greater than 0, from {1 / LARGEST_WEIGHT:g} to "
                f"{LARGEST_WEIGHT:g}; leave a source out to have none of it"
            )
        if self.max_epochs is not None and not 0 < self.max_epochs <= MOST_EPOCHS:
            raise UserError(
                f"{key}.max_epochs is {self.max_epochs}; it must be greater than 0 and at most {MOST_EPOCHS:g}, or null"
            )
        for tag, factor in self.resample.items():
            if not 0 <= factor <= LARGEST_FACTOR:
                raise UserError(f"{key}.resample.{tag} is {factor}; it must be from 0 to {LARGEST_FACTOR:g}")


@dataclass(frozen=True)
class Limits:
    """What fits into a pack, and what happens to a sample that doesn't.

    A plain text longer than a pack is always split: its pieces overlap by one token, so every token is a target once.
    For everything else ``oversize`` decides: ``drop`` leaves it out, ``truncate`` cuts what follows the last token
    that fits (and drops what would lose an image or all targets), ``error`` refuses to start.
    """

    sequence_length: int
    max_tiles: int
    oversize: str = "drop"
    max_documents: int = 128

    def __post_init__(self):
        if self.sequence_length < 2:
            raise UserError(f"data.sequence_length is {self.sequence_length}; it must be 2 or more")
        if self.max_tiles < 1:
            raise UserError(f"data.max_tiles is {self.max_tiles}; it must be 1 or more")
        if self.max_documents < 1:
            raise UserError(f"data.max_documents is {self.max_documents}; it must be 1 or more")
        if self.oversize not in OVERSIZE:
            raise UserError(f"data.oversize is {self.oversize!r}; it must be one of {', '.join(OVERSIZE)}")


@dataclass
class Counts:
    """Samples of a source: all good ones in its index, and what was done to those that don't fit."""

    samples: int = 0
    excluded: int = 0  # by `data quarantine apply`
    rejected: int = 0  # at index time
    split: int = 0
    truncated: int = 0
    dropped: int = 0


class SourceTable:
    """The drawable pieces of one source, in the order of its shards and their samples.

    Attributes:
        tokens: int32 [n], real tokens of each piece.
        tiles: int32 [n].
        shards: the indexed shards it was made of.
        counts: what became of the samples.
        digest: SHA-256 (hex) of the rows of its shards.
        quarantine: which of them were left out, in a few words.
    """

    def __init__(self, name: str, source: Source, index: Index, limits: Limits):
        """
        Raises:
            UserError: no such shard, no sample left, a tag that no sample has, a sample too large with ``error``.
        """
        self.name, self.source, self.counts = name, source, Counts()
        self.shards = [index[shard] for shard in _matching(index, source.shards, name)]
        excluded = [index.excluded.get(shard.name, np.empty(0, np.int64)) for shard in self.shards]
        self.digest = _hash([shard.digest for shard in self.shards])
        left_out = {shard.name: rows.tolist() for shard, rows in zip(self.shards, excluded) if len(rows)}
        self.quarantine = f"{sum(map(len, left_out.values()))} samples ({_hash(left_out)[:8]})" if left_out else "none"
        parts = [self._pieces(shard, rows, limits) for shard, rows in zip(self.shards, excluded)]
        rows, starts, tokens, tiles = (np.concatenate(columns) for columns in zip(*parts))
        if not len(rows):
            raise UserError(self._empty(index, limits))
        self._rows, self._starts, self.tokens, self.tiles = rows, starts, tokens, tiles
        self._ends = np.cumsum([len(part[0]) for part in parts])
        self._sizes = [len(part[0]) for part in parts]

    def locate(self, piece: int) -> tuple[Sample, int, int]:
        """The sample of a piece, the first of its tokens that the piece has, and their number."""
        shard = self.shards[int(np.searchsorted(self._ends, piece, side="right"))]
        return shard.sample(int(self._rows[piece])), int(self._starts[piece]), int(self.tokens[piece])

    def pieces_of(self, shard: int) -> range:
        """The pieces of the shard at this place in ``shards``."""
        end = int(self._ends[shard])
        return range(end - self._sizes[shard], end)

    def unused(self) -> str | None:
        """In one line, how many samples of the source a run never sees whole, and why; None if it sees all."""
        counts = self.counts
        reasons = {
            "rejected by the index": counts.rejected,
            "in quarantine": counts.excluded,
            "dropped as larger than a pack": counts.dropped,
            "truncated": counts.truncated,
        }
        told = [f"{count:,} {reason}" for reason, count in reasons.items() if count]
        if torn := sum(shard.torn is not None for shard in self.shards):
            told.append(f"and what was lost in {torn:,} torn shards")
        total = counts.samples + counts.rejected
        return f"data.sources.{self.name}: of {total:,} samples {', '.join(told)}" if told else None

    def text_share(self) -> float:
        """Tokens of samples without images over all tokens of an epoch."""
        tokens = self.tokens * self.factors()
        return float(tokens[self.tiles == 0].sum() / tokens.sum())

    def factors(self) -> np.ndarray:
        """How often each piece comes in an epoch, float [n]."""
        if not self.source.resample:
            return np.ones(len(self.tokens))
        known = frozenset().union(*(shard.tags for shard in self.shards))
        for tag in self.source.resample:
            if tag not in known:
                found = f"the tags are {', '.join(sorted(known)[:20])}" if known else "they have no tags"
                raise UserError(f"data.sources.{self.name}.resample.{tag}: no sample has this tag; {found}")
        factors, start = [], 0
        for shard, size in zip(self.shards, self._sizes):
            of_row = np.full(len(shard), -1.0)
            for tag, factor in self.source.resample.items():
                rows = shard.rows_with_tag(tag)
                of_row[rows] = np.maximum(of_row[rows], factor)
            of_row[of_row < 0] = 1.0
            factors.append(of_row[self._rows[start : start + size]])
            start += size
        result = np.concatenate(factors)
        if not result.any():
            raise UserError(f"data.sources.{self.name}.resample leaves no sample; raise a factor above 0")
        return result

    def _pieces(self, shard: ShardIndex, excluded: np.ndarray, limits: Limits) -> tuple[np.ndarray, ...]:
        """Row, first token, tokens and tiles of each piece of a shard, int32 each."""
        length, tokens, tiles, text = limits.sequence_length, shard.tokens, shard.tiles, shard.text
        keep = np.ones(len(shard), bool)
        keep[excluded] = False
        large = (tokens > length) | (tiles > limits.max_tiles)
        split, cut = keep & large & text, keep & large & ~text
        if limits.oversize == "error" and cut.any():
            sample = shard.sample(int(np.flatnonzero(cut)[0]))
            raise UserError(
                f"{_size(sample)} is more than data.sequence_length {length} or data.max_tiles {limits.max_tiles}; "
                "raise them, or set data.oversize to drop or truncate"
            )
        fits = (shard.least <= length) & (tiles <= limits.max_tiles)
        truncated = cut & fits if limits.oversize == "truncate" else np.zeros_like(cut)
        dropped = cut & ~truncated
        self._count(shard, excluded=int((~keep).sum()), split=split, truncated=truncated, dropped=dropped)

        rows = np.flatnonzero(keep & ~dropped).astype(np.int32)
        pieces = np.where(split[rows], -(-(tokens[rows] - 1) // (length - 1)), 1)
        first = np.repeat(np.cumsum(pieces) - pieces, pieces)
        rows = np.repeat(rows, pieces)
        starts = ((np.arange(len(rows)) - first) * (length - 1)).astype(np.int32)
        return rows, starts, np.minimum(tokens[rows] - starts, length).astype(np.int32), tiles[rows]

    def _count(self, shard: ShardIndex, excluded: int, **masks: np.ndarray) -> None:
        self.counts.samples += len(shard)
        self.counts.rejected += shard.rejected
        self.counts.excluded += excluded
        for name, mask in masks.items():
            setattr(self.counts, name, getattr(self.counts, name) + int(mask.sum()))

    def _empty(self, index: Index, limits: Limits) -> str:
        """Why nothing is left, with the first sample that shows it."""
        counts = self.counts
        if counts.dropped:
            shard = next(shard for shard in self.shards if len(shard))
            return (
                f"data.sources.{self.name} has no samples left: all {counts.dropped} are larger than a pack, such as "
                f"{_size(shard.sample(0))}; raise data.sequence_length {limits.sequence_length} or data.max_tiles "
                f"{limits.max_tiles}"
            )
        for shard in self.shards:
            if why := index.complaint(shard.name):
                return f"data.sources.{self.name} has no good samples: {why}; mend the shards or name others"
        return f"data.sources.{self.name} has no samples: its shards are empty; remove it or name other shards"


def _hash(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _size(sample: Sample) -> str:
    return f"{sample.where} with {sample.tokens} tokens and {sample.tiles} tiles"


def _matching(index: Index, patterns: Sequence[str], name: str) -> list[str]:
    if not patterns:
        raise UserError(f"data.sources.{name}.shards is empty; name at least one shard")
    shards: dict[str, None] = {}
    for pattern in patterns:
        found = [pattern] if pattern in index else sorted(fnmatch.filter(index, pattern))
        if not found:
            raise UserError(f"data.sources.{name}.shards: {pattern!r} is not in the index; correct it or index it")
        shards.update(dict.fromkeys(found))
    return list(shards)
