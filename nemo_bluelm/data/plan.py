"""The plan: which samples go into which pack, from the index alone, before a pixel is read."""

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from nemo_bluelm.data.index import Index, Sample
from nemo_bluelm.data.order import SourceOrder
from nemo_bluelm.data.packs import padded_length
from nemo_bluelm.data.table import Limits, Source, SourceTable
from nemo_bluelm.errors import UserError

VERSION = 3  # raise it with any change of order or packing: a run planned by another version then refuses to resume
LOOKAHEAD = 64  # samples of a source that wait for a pack they fit into; more pack better and mix over a wider stretch
_CHUNK = 1024  # positions whose samples are looked up at once; does not change the plan


class Piece(NamedTuple):
    """A sample, or a part of a long text, at its place in the plan; ``table`` counts sources in the plan's order."""

    table: int
    position: int  # in the source's endless sequence
    index: int  # in the source's table
    tokens: int
    tiles: int


class Pack(NamedTuple):
    """One row: its place in the global order, and what lies in it, in that order."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """Real tokens; padding is not counted."""
        return sum(piece.tokens for piece in self.pieces)

    @property
    def tiles(self) -> int:
        return sum(piece.tiles for piece in self.pieces)


class MixturePlan:
    """An iterator over packs in one global order, a pure function of its arguments.

    - *Mixture*: the next sample comes from the source with the fewest tokens relative to its weight among those that
      have one that fits. A source may run ahead by its share of one pack; rather than more, a pack stays short.
    - *Order*: each source's samples come in a permutation that depends on (seed, source, epoch) only.
    - *Packing*: of each source ``LOOKAHEAD`` samples wait; the oldest goes in if it fits, else the largest that does,
      within the caps of tokens, tiles and documents. A pack opens with the oldest of the neediest source, so none waits
      for ever.
    - *Elasticity*: the order knows nothing of ranks. They take packs in turn, so any data-parallel size that divides a
      global batch gives the same batches.

    Args:
        index: samples by shard.
        sources: the mixture by name. Their order does not matter.
        seed: of the order.
        sequence_length: tokens in a pack, a multiple of ``alignment``.
        max_tiles: tiles in a pack.
        alignment: each piece takes its length rounded up to a multiple of this.
        oversize: see :class:`nemo_bluelm.data.table.Limits`.
        max_documents: pieces in a pack.

    Attributes:
        index: the index it was planned from.
        tables: by source, in the plan's order.
        identity: everything that the plan depends on, as {recipe key: value}; two plans with one identity are equal.

    Raises:
        UserError: a weight, an epoch limit or a length that can't be; as :class:`SourceTable`.
    """

    def __init__(
        self,
        index: Index,
        sources: Mapping[str, Source],
        seed: int,
        sequence_length: int = 4096,
        max_tiles: int = 64,
        alignment: int = 1,
        oversize: str = "drop",
        max_documents: int = 128,
    ):
        limits = Limits(sequence_length, max_tiles, oversize, max_documents)
        if sequence_length % alignment:
            nearest = max(1, round(sequence_length / alignment)) * alignment
            raise UserError(
                f"data.sequence_length is {sequence_length}, not a multiple of {alignment} as the layout needs; "
                f"the nearest is {nearest}"
            )
        if not sources:
            raise UserError("data.sources is empty; name at least one source with its shards")
        for name, source in sources.items():
            source.check(name)
        self.tables = [SourceTable(name, sources[name], index, limits) for name in sorted(sources)]
        self.index = index
        self.sequence_length, self.alignment = sequence_length, alignment
        self.max_tiles, self.max_documents = max_tiles, max_documents
        self._queues = [_Queue(i, table, seed, alignment) for i, table in enumerate(self.tables)]
        self._number = 0
        self.identity = _identity(index, self.tables, seed, limits, alignment)

    def __iter__(self) -> Iterator[Pack]:
        return self

    def __next__(self) -> Pack:
        """The next pack; StopIteration when every source has reached its ``max_epochs``."""
        pieces, room, tiles = [], self.sequence_length, self.max_tiles
        while room and len(pieces) < self.max_documents and (piece := self._next_piece(room, tiles)):
            pieces.append(piece)
            room -= padded_length(piece.tokens, self.alignment)
            tiles -= piece.tiles
        if not pieces:
            raise StopIteration
        self._number += 1
        return Pack(self._number - 1, tuple(pieces))

    @property
    def number(self) -> int:
        """Packs delivered so far, which is the number of the next one."""
        return self._number

    def tokens(self) -> dict[str, int]:
        """Tokens delivered so far, by source."""
        return {queue.table.name: queue.tokens for queue in self._queues}

    def text_share(self) -> float:
        """Share of samples without images in the mixture's tokens while every source lasts, from 0 to 1."""
        weighted = [(queue.weight, queue.table.text_share()) for queue in self._queues]
        return sum(weight * share for weight, share in weighted) / sum(weight for weight, _ in weighted)

    def epochs(self) -> dict[str, float]:
        """How often each source has been gone through so far."""
        return {queue.table.name: queue.delivered / queue.order.epoch_length for queue in self._queues}

    def epoch_of(self, piece: Piece) -> int:
        """How often the piece's source had been gone through before."""
        return piece.position // self._queues[piece.table].order.epoch_length

    def locate(self, piece: Piece) -> tuple[Sample, int, int]:
        """The piece's sample, the first of the sample's tokens that it has, and their number."""
        return self.tables[piece.table].locate(piece.index)

    def state(self) -> dict[str, Any]:
        """All that is needed to go on after the last delivered pack; plain numbers, lists and strings."""
        queues = {queue.table.name: queue.state() for queue in self._queues}
        return {"packs": self._number, "sources": queues, "identity": self.identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken. Reads no file.

        Raises:
            UserError: the state is another plan's; it names the first thing that differs.
        """
        then = state["identity"]
        for key in [*self.identity, *then]:
            if self.identity.get(key) != then.get(key):
                raise UserError(
                    f"{key} is {self.identity.get(key, 'absent')}, but the run was planned with "
                    f"{then.get(key, 'none')}; restore it, or choose another run_dir to start afresh"
                )
        self._number = state["packs"]
        for queue in self._queues:
            queue.restore(state["sources"][queue.table.name])

    def _next_piece(self, room: int, tiles: int) -> Piece | None:
        active = [queue for queue in self._queues if queue.waiting]
        weight, total = sum(queue.weight for queue in active), sum(queue.tokens for queue in active)
        active.sort(key=_Queue.need)
        for rank, queue in enumerate(active):
            share = queue.weight / weight
            behind = queue.tokens < share * (total + self.sequence_length)
            if (rank == 0 or behind) and (piece := queue.take(room, tiles)):
                return piece
        return None


class _Entry(NamedTuple):
    """A waiting piece; entries sort by what they take up."""

    padded: int
    tiles: int
    position: int
    index: int
    tokens: int


class _Queue:
    """One source in the plan: the pieces that wait, and how far it has come."""

    def __init__(self, number: int, table: SourceTable, seed: int, alignment: int):
        self._number, self._alignment = number, alignment
        self.table, self.weight = table, table.source.weight
        self.order = SourceOrder(seed, table.name, table.factors())
        epochs = table.source.max_epochs
        self._end = math.inf if epochs is None else max(1, math.floor(epochs * self.order.epoch_length))
        self.restore({"next": 0, "tokens": 0, "waiting": []})

    @property
    def delivered(self) -> int:
        """Pieces delivered so far."""
        return self._next - len(self.waiting)

    def need(self) -> float:
        """Tokens relative to the weight: the smaller, the more this source is behind."""
        return self.tokens / self.weight

    def take(self, room: int, tiles: int) -> Piece | None:
        """Remove and return the oldest piece if it fits, else the largest that does, else None."""
        while self._arrivals[0].position in self._gone:
            self._gone.remove(self._arrivals.popleft().position)
        entry = self._arrivals[0]
        if entry.padded <= room and entry.tiles <= tiles:
            self._arrivals.popleft()
            del self.waiting[bisect_left(self.waiting, entry)]
        else:
            at = bisect_right(self.waiting, (room, tiles, math.inf)) - 1
            while at >= 0 and self.waiting[at].tiles > tiles:
                at -= 1
            if at < 0:
                return None
            entry = self.waiting.pop(at)
            self._gone.add(entry.position)
        self.tokens += entry.tokens
        self._fill()
        return Piece(self._number, entry.position, entry.index, entry.tokens, entry.tiles)

    def state(self) -> dict[str, Any]:
        waiting = sorted(entry.position for entry in self.waiting)
        return {"next": self._next, "tokens": self.tokens, "waiting": waiting}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._next, self.tokens = state["next"], state["tokens"]
        positions = set(state["waiting"])
        first = min(positions, default=self._next)
        self._upcoming: deque[_Entry] = deque()
        self._gone: set[int] = set()
        entries = [entry for entry in self._entries(first, self._next) if entry.position in positions]
        self._arrivals, self.waiting = deque(entries), sorted(entries)
        self._fill()

    def _fill(self) -> None:
        while len(self.waiting) < LOOKAHEAD and self._next < self._end:
            if not self._upcoming:
                self._upcoming.extend(self._entries(self._next, min(self._next + _CHUNK, self._end)))
            entry = self._upcoming.popleft()
            self._next += 1
            self._arrivals.append(entry)
            insort(self.waiting, entry)

    def _entries(self, start: int, end: int) -> list[_Entry]:
        entries: list[_Entry] = []
        while (at := start + len(entries)) < end:
            drawn = self.order.draw(at, end - at)
            tokens, tiles = self.table.tokens[drawn], self.table.tiles[drawn]
            padded = -(-tokens // self._alignment) * self._alignment
            columns = padded.tolist(), tiles.tolist(), range(at, at + len(drawn)), drawn.tolist(), tokens.tolist()
            entries += map(_Entry._make, zip(*columns))
        return entries


def _identity(index: Index, tables: list[SourceTable], seed: int, limits: Limits, alignment: int) -> dict[str, Any]:
    identity = {
        "plan version": VERSION,
        "seed": seed,
        "data.sequence_length": limits.sequence_length,
        "data.max_tiles": limits.max_tiles,
        "data.max_documents": limits.max_documents,
        "data.oversize": limits.oversize,
        "alignment of documents": alignment,
        **index.settings,
    }
    for table in tables:
        key, source = f"data.sources.{table.name}", table.source
        identity |= {
            f"{key}.weight": float(source.weight),
            f"{key}.max_epochs": source.max_epochs,
            f"{key}.resample": dict(sorted(source.resample.items())),
            f"content of {key}.shards": table.digest,
            f"quarantine of {key}": table.quarantine,
        }
    return identity
