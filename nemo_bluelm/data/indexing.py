"""Index one shard: its rows as an Arrow file, and the facts about them that say when they are stale. No torch."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from nemo_bluelm.atomic import partial_file, write_atomically
from nemo_bluelm.data.chat import Encoded
from nemo_bluelm.data.files import Files, NotFound, Read, ReadError, Stat, window
from nemo_bluelm.data.groups import Group, Torn
from nemo_bluelm.data.headers import read_header
from nemo_bluelm.data.ledger import Entry, Ledger
from nemo_bluelm.data.records import VERSION, ImageFile, find_images, load_record, located
from nemo_bluelm.data.shards import scan
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry

BATCH = 4096  # rows that are in memory at a time
LEDGER = "quarantine.jsonl"

_IMAGE = pa.struct(
    [("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("width", pa.int32()), ("height", pa.int32())]
)
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("tokens", pa.int32()),
        ("tiles", pa.int32()),
        ("least", pa.int32()),
        ("text", pa.bool_()),
        ("images", pa.list_(_IMAGE)),
        ("tags", pa.list_(pa.string())),
        ("digest", pa.binary(16)),
    ]
)


class Task(NamedTuple):
    """A shard to index: its name, the stem of its two files, and what it was before the scan (None: no such file)."""

    shard: str
    stem: str
    stat: Stat | None


@dataclass(frozen=True)
class Facts:
    """What the sidecar of a shard's rows says; its arrival commits them.

    Attributes:
        stat: the shard as it was indexed; None where it couldn't be read, so that it is tried again.
        file: name of the Arrow file, and its size in bytes.
        samples, rejected, images, tokens: counts.
        torn: why samples at the shard's end, or all of them, are lost.
        tags: all that occur, sorted.
        digest: SHA-256 (hex) of the rows, free of places outside the shard.
    """

    stat: Stat | None
    file: str
    size: int
    samples: int
    rejected: int
    images: int
    tokens: int
    torn: str | None
    tags: list[str]
    digest: str


def settings_of(geometry: Geometry, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that rows depend on besides the shard, as JSON has it."""
    return {"record version": VERSION, "geometry": dataclasses.asdict(geometry), "tokenizer": tokenizer.digest}


def sidecar(folder: Path, stem: str) -> Path:
    return folder / f"{stem}.json"


def load_facts(folder: Path, stem: str) -> Facts | None:
    """The committed facts of a shard, unless there are none or their rows are gone."""
    try:
        fields = json.loads(sidecar(folder, stem).read_bytes())
        facts = Facts(**fields | {"stat": fields["stat"] and Stat(*fields["stat"])})
        return facts if os.stat(folder / facts.file).st_size == facts.size else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


class Indexer:
    """Writes the rows of one shard after the other into ``folder``."""

    def __init__(self, root: str, folder: Path, geometry: Geometry, tokenizer: Tokenizer):
        self._files = Files(root)
        self._folder, self._geometry, self._tokenizer = folder, geometry, tokenizer
        self._ledger = Ledger(folder / LEDGER)

    def index(self, task: Task, progress: Callable[[int], None]) -> Facts:
        """Index a shard and commit it; bad samples go to the ledger.

        Args:
            progress: called with the samples done since its last call, every now and then.

        Raises:
            UserError: the index can't be written; nothing half-written stays.
        """
        rows = _Rows()
        with writing(self._folder), partial_file(self._folder / f"{task.stem}.arrow") as partial:
            with open(partial, "wb") as file, pa.ipc.new_file(file, SCHEMA) as out:
                torn, stat = self._scan(task, rows, lambda batch: (out.write_batch(batch), progress(batch.num_rows)))
            facts = rows.facts(task, stat, torn, partial.stat().st_size)
            os.replace(partial, self._folder / facts.file)
            write_atomically(sidecar(self._folder, task.stem), json.dumps(dataclasses.asdict(facts)).encode())
        return facts

    def _scan(
        self, task: Task, rows: "_Rows", write: Callable[[pa.RecordBatch], Any]
    ) -> tuple[str | None, Stat | None]:
        """Fills ``rows``; returns why the shard's end is lost, and its stat if it was read."""
        try:
            read = self._files.reader(task.shard, task.stat and task.stat.size)
            for group in scan(task.shard, self._files):
                self._add(task.shard, read, group, rows)
                if rows.full:
                    write(rows.take())
            torn, stat = None, task.stat
        except Torn as error:
            torn, stat = error.reason, task.stat
            self._ledger.append(self._entry(task.shard, "", error.offset, f"the shard is torn: {error.reason}"))
        except ReadError as error:
            torn, stat = str(error), None
            self._ledger.append(self._entry(task.shard, "", 0, str(error)))
        write(rows.take())
        return torn, stat

    def _add(self, shard: str, read: Read, group: Group, rows: "_Rows") -> None:
        data = b""
        try:
            record, data = load_record(read, group)
            images = [self._image(shard, read, image) for image in find_images(self._files, shard, group, record)]
            counts = [self._geometry.image_tokens(image["width"], image["height"]) for image in images]
            encoded = record.encode(self._tokenizer, counts)
        except ReadError:
            raise  # that is the shard's fault
        except UserError as error:
            rows.rejected += 1
            self._ledger.append(self._entry(shard, group.key, group.offset, str(error), data))
            return
        json_offset, json_size = group.members["json"]
        rows.add(
            {
                "key": record.id or group.key,
                "offset": group.offset,
                "json_offset": json_offset,
                "json_size": json_size,
                "tokens": len(encoded.tokens),
                "tiles": sum(counts) // self._geometry.tokens_per_tile,
                "least": _least(encoded, self._tokenizer.im_end),
                "text": record.messages is None and not images,
                "images": images,
                "tags": list(record.tags),
                "digest": hashlib.sha256(data).digest()[:16],
            }
        )

    def _entry(self, shard: str, key: str, offset: int, error: str, data: bytes = b"") -> Entry:
        sha1 = hashlib.sha1(data).hexdigest() if data else ""
        return Entry(self._files.absolute(shard), key, offset, sha1, error, "index")

    def _image(self, shard: str, read: Read, image: ImageFile) -> dict[str, Any]:
        loose = image.file != shard
        try:
            source = self._files.reader(image.file, image.member.size) if loose else read
            with located(f"image {image.name}"):
                header = read_header(window(source, *image.member))
        except NotFound as error:
            if loose:
                raise UserError(f"its image {error}") from error
            raise
        offset, size = image.member
        return {"name": image.name, "offset": offset, "size": size, "width": header.width, "height": header.height}


class _Rows:
    """Rows on their way to the file, and what is counted of all of them."""

    def __init__(self):
        self.rejected = 0
        self._waiting: list[dict] = []
        self._samples = self._images = self._tokens = 0
        self._tags: set[str] = set()
        self._hash = hashlib.sha256()

    @property
    def full(self) -> bool:
        return len(self._waiting) >= BATCH

    def add(self, row: dict) -> None:
        self._waiting.append(row)
        self._samples += 1
        self._images += len(row["images"])
        self._tokens += row["tokens"]
        self._tags.update(row["tags"])
        self._hash.update(repr(row).encode())

    def take(self) -> pa.RecordBatch:
        batch = pa.RecordBatch.from_pylist(self._waiting, SCHEMA)
        self._waiting.clear()
        return batch

    def facts(self, task: Task, stat: Stat | None, torn: str | None, size: int) -> Facts:
        digest = self._hash.hexdigest()
        # A new name for new rows. Nobody removes the old file: a job that began with it opens it time and again.
        file = f"{task.stem}-{digest[:8]}.arrow"
        counts = (self._samples, self.rejected, self._images, self._tokens)
        return Facts(stat, file, size, *counts, torn, sorted(self._tags), digest)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what a disk does to a writer into one line.

    Raises:
        UserError: the folder is full, read-only or no folder.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"index {folder} can't be written: {error.strerror or error}; make room or choose another folder"
        ) from error


def _least(encoded: Encoded, im_end: int) -> int:
    """Fewest leading tokens that hold every image and one target."""
    images = len(encoded.tokens) - encoded.tokens[::-1].index(im_end) if encoded.images else 0
    return max(images, encoded.loss_mask.index(True) + 1)
