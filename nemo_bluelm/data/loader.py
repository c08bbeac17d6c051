"""From planned packs to tensors: read, decode, encode, collate; a bad sample becomes a hole, never an exception."""

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

from nemo_bluelm.config.schema import ControlToken
from nemo_bluelm.data.chat import Encoded
from nemo_bluelm.data.decode import Backend, BadSample
from nemo_bluelm.data.files import Files
from nemo_bluelm.data.groups import Member
from nemo_bluelm.data.index import Sample
from nemo_bluelm.data.ledger import Entry
from nemo_bluelm.data.packs import PackedBatch, collate
from nemo_bluelm.data.plan import MixturePlan, Pack
from nemo_bluelm.data.records import Record
from nemo_bluelm.data.teacher_logits import TeacherLogits
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry

_JUDGED_FROM = 100  # samples read before data.max_bad_fraction applies: of a handful, one is already a large part

T, R = TypeVar("T"), TypeVar("R")


class Document(NamedTuple):
    """One segment of a loaded pack: ``length`` tokens of ``sample`` from ``start``; ``bad`` says why it is a hole.

    ``epoch`` counts how often the source had been gone through before.
    """

    source: str
    epoch: int
    sample: Sample
    start: int
    length: int
    bad: str | None


@dataclass(frozen=True)
class LoadedPack:
    """A pack as tensors, and where each of its segments comes from."""

    number: int
    batch: PackedBatch
    documents: tuple[Document, ...]

    @property
    def holes(self) -> list[int]:
        """Places of the bad samples among the documents."""
        return [place for place, document in enumerate(self.documents) if document.bad is not None]


class _Fault(Exception):
    """Why a sample can't be used, and the bytes that show it."""

    def __init__(self, stage: str, reason: str, offset: int, data: bytes = b""):
        self.stage, self.reason, self.offset, self.data = stage, reason, offset, data


class PackLoader:
    """Turns packs of a plan into tensors. Safe to share between threads.

    A sample that can't be read or decoded becomes a hole: pad tokens of the planned length, no targets, no tiles. The
    other documents of the pack keep their places and pixels. Each bad sample gets one row in the index's ledger.

    Args:
        plan: where packs come from.
        files: reads the shards.
        tokenizer: of the records.
        geometry: of the tiles.
        backend: decodes the images.
        max_bad_fraction: of the samples read by this process; beyond it something larger is wrong.
        control_token: its place in queries; a document's length doesn't depend on it.

    Attributes:
        teacher: adds what a teacher said of the documents; None, or set before the first pack is loaded.
        samples, bad_samples: documents loaded by this process so far, and how many of them were holes.
    """

    def __init__(
        self,
        plan: MixturePlan,
        files: Files,
        tokenizer: Tokenizer,
        geometry: Geometry,
        backend: Backend,
        max_bad_fraction: float = 0.1,
        control_token: ControlToken = ControlToken.after_query,
    ):
        self._control_token = control_token
        self.plan, self.tokenizer, self.geometry = plan, tokenizer, geometry
        self._files, self._backend, self._max_bad_fraction = files, backend, max_bad_fraction
        self.teacher: TeacherLogits | None = None
        self.samples = self.bad_samples = 0
        self._last_fault = ""
        self._lock = threading.Lock()

    def load(self, pack: Pack) -> LoadedPack:
        """The pack with its pixels.

        Raises:
            UserError: more bad samples than ``max_bad_fraction``.
        """
        documents = [self._locate(piece) for piece in pack.pieces]
        encoded = [self._attempt(self._encode, document) for document in documents]
        images = [[] if isinstance(e, _Fault) else self._attempt(self._images, d) for e, d in zip(encoded, documents)]
        tiles = self._decode(documents, images)
        faults = [next((r for r in results if isinstance(r, _Fault)), None) for results in zip(encoded, images, tiles)]
        self._record(documents, faults)
        marked = [d._replace(bad=fault and fault.reason) for d, fault in zip(documents, faults)]
        kept = [part for parts, fault in zip(tiles, faults) if not fault for part in parts]
        texts = [self._hole(d) if fault else e for d, e, fault in zip(documents, encoded, faults)]
        side = self.geometry.tile
        whole = torch.cat(kept) if kept else torch.empty(0, 3, side, side, dtype=torch.uint8)
        batch = self._collate(texts, whole, [piece.table for piece in pack.pieces])
        if self.teacher is not None:
            batch = self.teacher.add_to(batch, marked)
        return LoadedPack(pack.number, batch, tuple(marked))

    def _locate(self, piece) -> Document:
        sample, start, length = self.plan.locate(piece)
        source = self.plan.tables[piece.table].name
        return Document(source, self.plan.epoch_of(piece), sample, start, length, None)

    def _encode(self, document: Document) -> Encoded:
        sample = document.sample
        payload = self._read(sample.shard, sample.json, sample.offset)
        if hashlib.sha256(payload).digest()[: len(sample.digest)] != sample.digest:
            raise _Fault("read", "its JSON changed since it was indexed", sample.offset, payload)
        counts = [self.geometry.image_tokens(image.width, image.height) for image in sample.images]
        encoded = Record.parse(payload).encode(self.tokenizer, counts, self._control_token)
        piece = slice(document.start, document.start + document.length)
        return Encoded(encoded.tokens[piece], encoded.loss_mask[piece], encoded.images)

    def _images(self, document: Document) -> list[bytes]:
        return [self._read(image.file, image.member, document.sample.offset) for image in document.sample.images]

    def _read(self, file: str, member: Member, offset: int) -> bytes:
        try:
            return self._files.read(file, member.offset, member.size)
        except UserError as error:
            raise _Fault("read", str(error), offset) from error

    def _decode(self, documents: list[Document], images: list) -> list:
        """Tiles of each document as a list of tensors, or its fault; one call of the backend for the whole pack."""
        whole = [[] if isinstance(data, _Fault) else data for data in images]
        decoded = iter(self._backend.tiles([image for data in whole for image in data], self.geometry))
        return [self._checked(d, data, [next(decoded) for _ in data]) for d, data in zip(documents, whole)]

    def _checked(self, document: Document, images: list[bytes], tiles: list) -> "list[torch.Tensor] | _Fault":
        for entry, data, tile in zip(document.sample.images, images, tiles):
            reason = tile.reason if isinstance(tile, BadSample) else None
            if reason is None and len(tile) != self.geometry.tiles(entry.width, entry.height):
                reason = "its size changed since it was indexed"
            if reason is not None:
                return _Fault("decode", f"image {entry.name}: {reason}", document.sample.offset, data)
        return tiles

    def _attempt(self, step: Callable[[Document], R], document: Document) -> "R | _Fault":
        try:
            return step(document)
        except _Fault as fault:
            return fault

    def _hole(self, document: Document) -> Encoded:
        return Encoded([self.tokenizer.pad] * document.length, [False] * document.length)

    def _collate(self, texts: list[Encoded], tiles: torch.Tensor, sources: list[int]) -> PackedBatch:
        return collate(texts, tiles, self.plan.sequence_length, self.plan.alignment, self.tokenizer.pad, sources)

    def _record(self, documents: list[Document], faults: "list[_Fault | None]") -> None:
        """Count the pack's samples, write the bad ones to the ledger, and stop where there are too many."""
        for document, fault in zip(documents, faults):
            if fault is not None:
                sample = document.sample
                sha1 = hashlib.sha1(fault.data).hexdigest()
                shard = self._files.absolute(sample.shard)
                entry = Entry(shard, sample.key, fault.offset, sha1, fault.reason, fault.stage)
                self.plan.index.ledger.append(entry)
                self._last_fault = f"{sample.where}: {fault.reason}"
        with self._lock:
            self.samples += len(documents)
            self.bad_samples += sum(fault is not None for fault in faults)
            samples, bad = self.samples, self.bad_samples
        if samples >= _JUDGED_FROM and bad > self._max_bad_fraction * samples:
            raise UserError(
                f"{bad} of {samples} samples could not be read or decoded, more than data.max_bad_fraction "
                f"{self._max_bad_fraction}; the last one: {self._last_fault}; mend the storage or the shards, or raise "
                "the limit"
            )


def prefetch(items: Iterable[T], load: Callable[[T], R], threads: int, ahead: int) -> Iterator[R]:
    """``load(item)`` for every item, in their order, up to ``ahead`` of them loaded before they are asked for.

    With 0 threads each is loaded when it is asked for. Closing the iterator drops what was not asked for.
    """
    if threads == 0:
        yield from map(load, items)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
    pending: deque = deque()
    try:
        for item in items:
            pending.append(pool.submit(load, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
