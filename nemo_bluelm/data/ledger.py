"""The quarantine ledger: one row for every bad sample, whoever meets it and however often."""

import contextlib
import dataclasses
import errno
import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from nemo_bluelm.errors import UserError
from nemo_bluelm.locks import hold_lock

_APPLIED, _CLEARED = "applied", "cleared"  # marker rows: {"applied": samples, "time": ...}


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

    Rows are never changed, and damaged ones are no rows. A row of stage ``read`` or ``decode`` takes its sample out of
    later runs only once :meth:`apply` was called, because that changes what a run sees; :meth:`clear` takes it back.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._seen: dict[tuple[str, int, str], str] = {}  # identity -> stage
        self._read = 0  # bytes of the file that _seen covers
        self._warned = False
        self._lock = threading.Lock()

    def append(self, entry: Entry) -> bool:
        """Add a row unless its (shard, offset, sha1) is there. Returns whether it was added.

        What failed to read or decode before :meth:`clear` counts as not there: it may fail again.
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
        """All rows, oldest first.

        Raises:
            UserError: the ledger can't be read.
        """
        return [row for row in self._rows() if isinstance(row, Entry)]

    def apply(self) -> int:
        """Leave out, from now on, every sample that failed since the last :meth:`clear`. Returns how many those are.

        Raises:
            UserError: the ledger can't be read or written.
        """
        with self._lock, self._using(), _Appender(self.path) as file:
            samples = _failed(_since_clear(self._rows()))
            file.append({_APPLIED: len(samples), "time": _now()})
        return len(samples)

    def clear(self) -> int:
        """Take all samples that are left out back in. Returns how many those are.

        Raises:
            UserError: as :meth:`apply`.
        """
        with self._lock, self._using(), _Appender(self.path) as file:
            samples = _excluded(self._rows())
            if samples:
                file.append({_CLEARED: len(samples), "time": _now()})
        return len(samples)

    def excluded(self) -> set[tuple[str, int]]:
        """(shard, offset) of the samples that :meth:`apply` left out and no :meth:`clear` took back.

        Raises:
            UserError: the ledger can't be read.
        """
        return _excluded(self._rows())

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the ledger {self.path} can't be used: {error.strerror}; mend it, or move it away to begin a new one"
            ) from error

    def _rows(self) -> "list[Entry | str]":
        with self._using():
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
            if isinstance(row, Entry):
                self._seen[_identity(row)] = row.stage
            elif row == _CLEARED:
                self._seen = {identity: stage for identity, stage in self._seen.items() if stage == "index"}
        self._read = file.size


class _Appender:
    """The ledger's file, locked against other threads and processes."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> "_Appender":
        self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            hold_lock(self._fd, self._path.parent)
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


def _excluded(rows: list[Entry | str]) -> set[tuple[str, int]]:
    rows = _since_clear(rows)
    last = max((at for at, row in enumerate(rows) if row == _APPLIED), default=0)
    return _failed(rows[:last])


def _since_clear(rows: list[Entry | str]) -> list[Entry | str]:
    return rows[max((at for at, row in enumerate(rows) if row == _CLEARED), default=0) :]


def _failed(rows: list[Entry | str]) -> set[tuple[str, int]]:
    return {(row.shard, row.offset) for row in rows if isinstance(row, Entry) and row.stage in ("read", "decode")}


def _parse(data: bytes) -> list[Entry | str]:
    """Entries and names of markers; a line that was cut when a process was killed, or that isn't ours, is no row."""
    return [row for row in map(_row, data.splitlines()) if row is not None]


def _row(line: bytes) -> Entry | str | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    for marker in (_APPLIED, _CLEARED):
        if fields.keys() == {marker, "time"}:
            return marker
    types = {name: type(value) for name, value in fields.items()}
    return Entry(**fields) if types == _TYPES and 0 <= fields["offset"] < 1 << 63 else None


_TYPES = {field.name: field.type for field in dataclasses.fields(Entry)}
