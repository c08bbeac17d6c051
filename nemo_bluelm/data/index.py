"""The index: place, token count and tile count of every sample, known before any pixel is read. No torch."""

import bisect
import contextlib
import errno
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nemo_bluelm.atomic import PARTIAL
from nemo_bluelm.data import index_workers
from nemo_bluelm.data.files import Files, expand
from nemo_bluelm.data.groups import Member
from nemo_bluelm.data.indexing import LEDGER, Facts, Indexer, Task, load_facts, settings_of, writing
from nemo_bluelm.data.ledger import Ledger
from nemo_bluelm.data.records import find_file
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry
from nemo_bluelm.locks import hold_lock

Progress = Callable[[int, int, int], None]  # (shards done, shards in all, samples so far)

_WORTH_A_WORKER = 32 << 20  # bytes of shards; a process takes half a second to start
_SILENCE = 5  # seconds of waiting for another process before a word about it
_OPEN = 256  # shards whose rows are mapped at a time


@dataclass(frozen=True)
class ImageEntry:
    """An image and its size in pixels after EXIF orientation.

    ``member`` is its place in ``file``: the shard or, for JSONL, a file of its own, named as the shard is.
    """

    name: str
    file: str
    member: Member
    width: int
    height: int


@dataclass(frozen=True)
class Sample:
    """A record in a shard.

    Attributes:
        shard: path relative to the index's root where below it, else absolute, or a URL.
        key: its ``id``, else its name in the tar or its line number.
        offset: byte of its first header or its line.
        json: place of the record in the shard.
        tokens: length of the whole record, encoded, image tokens included.
        tiles: of all its images.
        least: fewest leading tokens that hold every image and one target.
        text: it has no images and is no conversation, so that it may be split.
        digest: first 16 bytes of the SHA-256 of its JSON.
    """

    shard: str
    key: str
    offset: int
    json: Member
    tokens: int
    tiles: int
    least: int
    text: bool
    images: tuple[ImageEntry, ...]
    tags: tuple[str, ...]
    digest: bytes

    @property
    def where(self) -> str:
        return f"{self.shard}: sample {self.key!r}"


class ShardIndex:
    """The samples of one shard, in its order; columns are read when they are asked for, and not kept.

    Attributes:
        name: the shard, as in :class:`Sample`.
        digest: SHA-256 (hex) of all rows, the same wherever the shard lies.
        rejected: bad samples, which are not among the rows.
        torn: why samples at its end, or all of them, are lost; None for a whole shard.
        tags: all that its samples have.
        num_images, num_tokens: of all its samples.
    """

    def __init__(self, name: str, facts: Facts, table: Callable):
        self.name = name
        self.digest, self.rejected, self.torn = facts.digest, facts.rejected, facts.torn
        self.tags = frozenset(facts.tags)
        self.num_images, self.num_tokens = facts.images, facts.tokens
        self._samples, self._file, self._table = facts.samples, facts.file, table

    def __len__(self) -> int:
        return self._samples

    @property
    def tokens(self) -> np.ndarray:
        """int32 [n]."""
        return self._column("tokens")

    @property
    def tiles(self) -> np.ndarray:
        """int32 [n]."""
        return self._column("tiles")

    @property
    def least(self) -> np.ndarray:
        """int32 [n]."""
        return self._column("least")

    @property
    def text(self) -> np.ndarray:
        """bool [n]."""
        return self._column("text")

    @property
    def offsets(self) -> np.ndarray:
        """int64 [n], ascending."""
        return self._column("offset")

    def rows_with_tag(self, tag: str) -> np.ndarray:
        """Rows of the samples that have ``tag``, int64 [m], ascending."""
        if tag not in self.tags:
            return np.empty(0, np.int64)
        import pyarrow.compute as pc

        tags = self._table(self._file).table["tags"].combine_chunks()
        rows = pc.list_parent_indices(tags).filter(pc.equal(pc.list_flatten(tags), tag))
        return np.unique(rows.to_numpy(zero_copy_only=False)).astype(np.int64)

    def sample(self, row: int) -> Sample:
        """The sample of a row, ``0 <= row < len(self)``."""
        if not 0 <= row < self._samples:
            raise IndexError(f"{self.name} has {self._samples} samples, no row {row}")
        fields = self._table(self._file).row(row)
        images = tuple(
            ImageEntry(
                image["name"],
                find_file(self.name, image["name"]),
                Member(image["offset"], image["size"]),
                image["width"],
                image["height"],
            )
            for image in fields.pop("images")
        )
        json = Member(fields.pop("json_offset"), fields.pop("json_size"))
        return Sample(shard=self.name, json=json, images=images, tags=tuple(fields.pop("tags")), **fields)

    def _column(self, name: str) -> np.ndarray:
        # A copy: a mapping for each of ten thousand shards would be more open files than most systems allow.
        return np.array(self._table(self._file).table[name].to_numpy())


class Index(Mapping[str, ShardIndex]):
    """The indexed shards by name, in sorted order.

    Attributes:
        folder: where it lies.
        root: folder or URL that relative names start from.
        settings: what the rows depend on besides the shards: version of the records, geometry, tokenizer.
        ledger: bad samples.
        excluded: for shards with samples that ``data quarantine apply`` left out: their rows, int64, ascending.
    """

    def __init__(self, folder: Path, root: str, settings: dict[str, Any], facts: Mapping[str, Facts]):
        self.folder, self.root, self.settings = folder, root, settings
        self.ledger = Ledger(folder / LEDGER)
        table = lru_cache(_OPEN)(lambda file: _Table(folder / file))
        self._shards = {name: ShardIndex(name, facts[name], table) for name in sorted(facts)}
        self.excluded = self._excluded()

    def __getitem__(self, name: str) -> ShardIndex:
        return self._shards[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def complaint(self, shard: str) -> str | None:
        """What is wrong with a shard, or with the first of its bad samples."""
        if self[shard].torn:
            return f"{shard}: {self[shard].torn}"
        path = Files(self.root).absolute(shard)
        first = next((entry for entry in self.ledger.entries() if entry.shard == path and entry.key), None)
        return first and f"{shard}: sample {first.key!r}: {first.error}"

    def _excluded(self) -> dict[str, np.ndarray]:
        if not (excluded := self.ledger.excluded()):
            return {}
        files = Files(self.root)
        names = {files.absolute(name): name for name in self._shards}
        offsets: dict[str, set[int]] = {}
        for shard, offset in excluded:
            if shard in names:
                offsets.setdefault(names[shard], set()).add(offset)
        rows = {shard: np.flatnonzero(np.isin(self[shard].offsets, list(found))) for shard, found in offsets.items()}
        return {shard: found for shard, found in rows.items() if len(found)}


def build_index(
    shards: Sequence[str],
    out: str | Path,
    geometry: Geometry,
    tokenizer: Tokenizer,
    *,
    root: str | Path = ".",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Index:
    """Index shards into the folder ``out``: headers and records only, no pixels.

    A shard that is there unchanged (size and time of modification, or what its store tells of it) with the same
    geometry and tokenizer is not read again. Several processes may call it at once: one builds, the others wait.
    A bad sample or a torn shard is no error but a row in the ledger. A file that is named by a JSONL and changes later
    is not noticed here.

    Args:
        shards: tars and ``.jsonl`` files: paths or globs, relative to ``root`` or absolute, or URLs.
        root: folder or URL.
        workers: processes; by default as many as are worth starting, none for a small corpus.
        progress: called with (shards done, shards in all, samples so far) now and then.

    Raises:
        UserError: a pattern without shards; the index can't be written.
    """
    names = expand(root, shards)
    files, folder = Files(root), Path(out)
    settings = settings_of(geometry, tokenizer)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        tasks = [
            Task(name, _stem(files.absolute(name), settings), stat) for name, stat in zip(names, files.stats(names))
        ]
        known = {task.shard: load_facts(folder, task.stem) for task in tasks}
        facts = {t.shard: known[t.shard] for t in tasks if t.stat and known[t.shard] and known[t.shard].stat == t.stat}
        stale = sorted((t for t in tasks if t.shard not in facts), key=lambda t: -t.stat.size if t.stat else 0)
        _index(stale, workers, str(root), folder, geometry, tokenizer, _Tally(facts, len(tasks), progress))
    return Index(folder, str(root), settings, facts)


class _Tally:
    """Collects facts and tells the progress."""

    def __init__(self, facts: dict[str, Facts], shards: int, progress: Progress | None):
        self._facts, self._shards, self._progress = facts, shards, progress
        self._samples = sum(known.samples for known in facts.values())
        self.add(0)

    def add(self, samples: int) -> None:
        self._samples += samples
        if self._progress:
            self._progress(len(self._facts), self._shards, self._samples)

    def done(self, task: Task, facts: Facts) -> None:
        self._facts[task.shard] = facts
        self.add(0)


def _index(
    tasks: list[Task],
    workers: int | None,
    root: str,
    folder: Path,
    geometry: Geometry,
    tokenizer: Tokenizer,
    tally: _Tally,
) -> None:
    if workers is None:
        worth = sum(task.stat.size for task in tasks if task.stat) // _WORTH_A_WORKER
        workers = min(len(os.sched_getaffinity(0)), worth)
    workers = min(workers, len(tasks))
    try:
        if workers > 1:
            index_workers.run(tasks, workers, root, folder, geometry, tokenizer, tally.add, tally.done)
        elif tasks:
            indexer = Indexer(root, folder, geometry, tokenizer)
            for task in tasks:
                tally.done(task, indexer.index(task, tally.add))
    finally:
        for partial in folder.glob(f"*{PARTIAL}") if tasks else ():  # of workers and runs that were killed
            partial.unlink(missing_ok=True)


def _stem(absolute: str, settings: dict[str, Any]) -> str:
    """Names the files of a shard's rows: another place or other settings give another one."""
    base = absolute.rpartition("/")[2].split("?")[0].rpartition(".")[0]
    short = os.fsencode(base)[:100].decode(errors="ignore")  # file systems count bytes
    return f"{short}-{hashlib.sha256(json.dumps([absolute, settings]).encode()).hexdigest()[:12]}"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone in the folder; one that can't be written needs no lock, since nobody changes it."""
    with writing(folder), contextlib.ExitStack() as stack:
        try:
            fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EROFS):
                raise
        else:
            stack.callback(os.close, fd)
            _wait_for(fd, folder)
        yield


def _wait_for(fd: int, folder: Path) -> None:
    words = f"waiting for another process that writes to the index {folder}"
    timer = threading.Timer(_SILENCE, lambda: print(words, file=sys.stderr, flush=True))
    timer.start()
    try:
        hold_lock(fd, folder)
    finally:
        timer.cancel()


class _Table:
    """The mapped rows of one shard."""

    def __init__(self, path: Path):
        import pyarrow as pa

        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self._batches = [reader.get_batch(at) for at in range(reader.num_record_batches)]
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"index file {path} is gone or damaged ({error}); index the shards again") from error
        self._starts = [0]
        for batch in self._batches[:-1]:
            self._starts.append(self._starts[-1] + batch.num_rows)
        self.table = pa.Table.from_batches(self._batches, reader.schema)

    def row(self, row: int) -> dict:
        at = bisect.bisect_right(self._starts, row) - 1
        batch, row = self._batches[at], row - self._starts[at]
        return {name: column[row].as_py() for name, column in zip(batch.schema.names, batch.columns)}
