"""The quarantine ledger: one row for every bad sample, for ever, whoever meets it and however often."""

import dataclasses
import errno
import fcntl
import json
import os
import sys
import threading
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Entry:
    """A bad sample or, with an empty key, a bad shard.

    Attributes:
        shard: absolute path or URL, for an index folder may serve several corpora.
        offset: byte in the shard at which the sample's first header or its line starts, or at which a shard is torn.
        sha1: SHA-1 (hex) of the bytes that are bad; empty where there are none.
        error: why, in one line.
        stage: what met it: ``index``, ``read`` or ``decode``.
        time: when it was met first; ISO 8601, UTC.
    """

    shard: str
    key: str
    offset: int
    sha1: str
    error: str
    stage: str
    time: str = field(default_factory=_now)


class Ledger:
    """An append-only JSONL file that threads, processes and runs share.

    Rows are never changed. A row of stage ``read`` or ``decode`` takes its sample out of later runs only once
    :meth:`apply` was called, because that changes what a run sees.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._seen: set[tuple[str, int, str]] = set()
        self._read = 0  # bytes of the file that _seen covers
        self._warned = False
        self._lock = threading.Lock()

    def append(self, entry: Entry) -> bool:
        """Add a row unless its (shard, offset, sha1) is there. Returns whether it was added.

        A ledger that can't be written is told once on stderr and must not stop the run that met the bad sample.
        """
        try:
            with self._lock, _Appender(self.path) as file:
                self._catch_up(file)
                if _identity(entry) in self._seen:
                    return False
                file.append(dataclasses.asdict(entry))
                self._catch_up(file)
                return True
        except OSError as error:
            if not self._warned:
                print(f"nemo-bluelm: warning: {self.path} can't be written: {error.strerror}", file=sys.stderr)
                self._warned = True
            return False

    def entries(self) -> list[Entry]:
        """All rows, oldest first."""
        return [Entry(**row) for row in self._rows() if "shard" in row]

    def apply(self) -> int:
        """Leave out, from now on, every sample that failed to read or decode so far. Returns how many those are.

        Raises:
            OSError: the ledger can't be written.
        """
        with self._lock, _Appender(self.path) as file:
            samples = _failed(self._rows())
            file.append({"applied": len(samples), "time": _now()})
        return len(samples)

    def excluded(self) -> set[tuple[str, int]]:
        """(shard, offset) of the samples that the last :meth:`apply` left out."""
        rows = self._rows()
        last = max((at for at, row in enumerate(rows) if "applied" in row), default=0)
        return _failed(rows[:last])

    def _rows(self) -> list[dict]:
        try:
            return _parse(self.path.read_bytes())
        except FileNotFoundError:
            return []

    def _catch_up(self, file: "_Appender") -> None:
        """Learn the rows that others added."""
        if file.size < self._read:  # the file was removed and begun anew
            self._seen.clear()
            self._read = 0
        for row in _parse(file.read(self._read)):
            if "shard" in row:
                self._seen.add((row["shard"], row["offset"], row["sha1"]))
        self._read = file.size


class _Appender:
    """The ledger's file, locked against other threads and processes."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> "_Appender":
        self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        except BaseException:
            os.close(self._fd)
            raise
        return self

    def __exit__(self, *_) -> None:
        os.close(self._fd)  # unlocks too

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def read(self, start: int) -> bytes:
        return os.pread(self._fd, self.size - start, start)

    def append(self, row: dict) -> None:
        """Write a whole line or nothing."""
        end = self.size
        cut = end and os.pread(self._fd, 1, end - 1) != b"\n"  # by a process that was killed
        line = ("\n" if cut else "") + json.dumps(row, ensure_ascii=True) + "\n"
        data = line.encode()
        try:
            written = os.write(self._fd, data)
        except OSError:
            os.ftruncate(self._fd, end)
            raise
        if written < len(data):
            os.ftruncate(self._fd, end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _identity(entry: Entry) -> tuple[str, int, str]:
    return entry.shard, entry.offset, entry.sha1


def _failed(rows: list[dict]) -> set[tuple[str, int]]:
    return {(row["shard"], row["offset"]) for row in rows if row.get("stage") in ("read", "decode")}


def _parse(data: bytes) -> list[dict]:
    """The whole lines; a line that was cut when a process was killed is no row."""
    rows = []
    for line in data.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
