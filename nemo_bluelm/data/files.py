"""Files by byte range, local or in any store that fsspec opens."""

import errno
import glob
import hashlib
import io
import os
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nemo_bluelm.errors import UserError

ATTEMPTS = 3
_QUESTIONS = 16  # at a time to a store
_BACKOFF = 0.5  # seconds before the second attempt, doubled for each further one
_BLOCK, _BLOCKS = 4 << 20, 8  # what a scan of a remote file fetches at a time and keeps

Read = Callable[[int, int], bytes]  # (offset, size) -> bytes


class ReadError(UserError):
    """A file that can't be read; the message names it."""


class NotFound(ReadError):
    """There is no such file, or none that this user may read; asking again won't help."""


class Stat(NamedTuple):
    """``size`` in bytes; ``version`` changes when the file does: time of modification, or what a store tells of it."""

    size: int
    version: str


class Files:
    """Reads byte ranges of files; safe to share between threads.

    A path is absolute, a URL, or relative to ``root``, which is a folder or a URL itself. Local files are read with
    ``pread`` through descriptors that stay open. Other stores are asked up to ``ATTEMPTS`` times.
    """

    def __init__(self, root: str | Path = ".", max_open: int = 64):
        self.root = str(root)
        self._open = lru_cache(max_open)(_Descriptor)

    def absolute(self, path: str) -> str:
        """The absolute path or URL of ``path``.

        Raises:
            NotFound: a name with a NUL, which no file has.
        """
        if "\0" in path:
            raise NotFound(f"{path!r} can't be read: no file has such a name")
        joined = join(self.root, path)
        return joined if is_remote(joined) else os.path.abspath(joined)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``.

        Raises:
            ReadError: the file is gone, forbidden or ends before them; a store fails time after time.
            UserError: as :func:`filesystem`.
        """
        absolute = self.absolute(path)
        if is_remote(absolute):
            data = _ask(absolute, lambda store, name: store.cat_file(name, start=offset, end=offset + size))
        else:
            try:
                file = self._open(absolute)  # a name for it, which keeps it open while we read
                data = os.pread(file.fd, size, offset)
            except OSError as error:
                raise _error(path, error) from error
        if len(data) != size:
            ranges = " (or its server knows no byte ranges)" if is_remote(absolute) else ""
            raise ReadError(f"{path} has no {size} bytes at byte {offset}{ranges}; restore the file, or index it again")
        return data

    def stat(self, path: str) -> Stat:
        """Size and version. Raises as :meth:`read`."""
        absolute = self.absolute(path)
        if is_remote(absolute):
            info = _ask(absolute, lambda store, name: store.info(name))
            if info.get("size") is None:
                raise ReadError(f"{path} can't be read: its server doesn't tell its size")
            return Stat(info["size"], hashlib.sha256(str(sorted(info.items())).encode()).hexdigest())
        try:
            found = os.stat(absolute)
        except OSError as error:
            raise _error(path, error) from error
        if not stat.S_ISREG(found.st_mode):
            raise NotFound(f"{path} can't be read: it is not a file")
        return Stat(found.st_size, str(found.st_mtime_ns))

    def stats(self, paths: Iterable[str]) -> list[Stat | None]:
        """Size and version of many files, asked for at a time; None where there is no answer."""

        def stat(path: str) -> Stat | None:
            try:
                return self.stat(path)
            except ReadError:
                return None

        with ThreadPoolExecutor(_QUESTIONS) as pool:
            return list(pool.map(stat, paths))

    def reader(self, path: str, size: int | None = None) -> Read:
        """Reads of one file that is gone through once, mostly forwards: remote ones are fetched in large blocks.

        Args:
            size: of the file in bytes, if it is known.
        """
        read = partial(self.read, path)
        if not is_remote(self.absolute(path)):
            return read
        return _Blocks(read, self.stat(path).size if size is None else size)

    def open(self, path: str) -> BinaryIO:
        """The file as a seekable stream. Raises as :meth:`read`."""
        absolute = self.absolute(path)
        if is_remote(absolute):
            size = self.stat(path).size
            return window(self.reader(path, size), 0, size, 1 << 16)
        try:
            return open(absolute, "rb")
        except OSError as error:
            raise _error(path, error) from error


def is_remote(path: str) -> bool:
    """Whether it is a URL and not a path."""
    return "://" in path


def join(root: str | Path, path: str) -> str:
    """``path`` if it is absolute or a URL, else that path below ``root``, which may be a URL too."""
    if is_remote(path):
        return path
    return f"{str(root).rstrip('/')}/{path}" if is_remote(str(root)) else os.path.join(root, path)


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the name it has there.

    Raises:
        UserError: nobody knows the protocol, or the package that does isn't installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url} needs a package that is not installed ({error}); install it with pip") from error
    except ValueError as error:
        raise UserError(f"{url} can't be opened ({error}); give a path or a URL that fsspec knows") from error


def expand(root: str | Path, patterns: Sequence[str]) -> list[str]:
    """Sorted files that match the patterns, without doubles, relative to ``root`` where below it.

    Args:
        patterns: paths or globs (``**`` too), relative to ``root`` or absolute, or URLs.

    Raises:
        UserError: ``root`` isn't a folder; no pattern at all, or one that matches no file.
    """
    root = str(root)
    if not is_remote(root) and not os.path.isdir(root):
        raise UserError(f"{root} is not a folder; name the one that holds the shards")
    if not patterns:
        raise UserError("no shards are named; name at least one")
    with ThreadPoolExecutor(_QUESTIONS) as pool:
        found = list(pool.map(partial(_matches, root), patterns))
    if not all(found):
        pattern = patterns[found.index(set())]
        raise UserError(f"{pattern!r} matches no file in {root}; correct one of them")
    return sorted(set.union(*found))


def window(read: Read, offset: int, size: int, buffer: int = 4096) -> BinaryIO:
    """``size`` bytes from ``offset`` as a seekable file that reads ``buffer`` bytes at a time."""
    return io.BufferedReader(_Window(read, offset, size), buffer)


def _matches(root: str, pattern: str) -> set[str]:
    """The files that one pattern names, named as :func:`expand` does."""
    joined = join(root, pattern)
    if is_remote(joined):
        return _remote_matches(root, joined)
    if os.path.isfile(joined):  # its name may look like a pattern
        matches = [joined]
    else:
        matches = glob.glob(os.path.join(glob.escape(root), pattern), recursive=True)
    base = os.path.abspath(root)
    paths = [Path(os.path.abspath(match)) for match in matches if os.path.isfile(match)]
    return {str(path.relative_to(base)) if path.is_relative_to(base) else str(path) for path in paths}


def _remote_matches(root: str, url: str) -> set[str]:
    if "*" in url or "[" in url:  # no "?": that starts the query of a URL
        found = _ask(url, lambda store, name: store.glob(name))
    else:
        found = _ask(url, lambda store, name: [name] if store.exists(name) else [])
    store, _ = filesystem(url)
    base = f"{filesystem(root)[1].rstrip('/')}/" if is_remote(root) else None
    return {
        name.removeprefix(base) if base and name.startswith(base) else store.unstrip_protocol(name) for name in found
    }


def _ask(url: str, question: Callable[[Any, str], Any]) -> Any:
    """What the store of ``url`` answers; failures that may pass are tried again."""
    store, name = filesystem(url)
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(_BACKOFF * 2 ** (attempt - 1))
        try:
            return question(store, name)
        except Exception as error:  # each store's package raises its own
            if _is_final(error):
                raise NotFound(f"{url} can't be read: {type(error).__name__}: {error}") from error
            last = error
    raise ReadError(f"{url} can't be read, tried {ATTEMPTS} times: {type(last).__name__}: {last}") from last


def _error(path: str, error: OSError) -> ReadError:
    return (NotFound if _is_final(error) else ReadError)(f"{path} can't be read: {error.strerror}")


def _is_final(error: Exception) -> bool:
    """Whether it is the name's fault and not the disk's or the store's."""
    if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)):
        return True
    return isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP)


class _Descriptor:
    """A file descriptor that closes with its last reader, so that eviction never closes it under one."""

    fd = -1

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self):
        if self.fd >= 0:
            os.close(self.fd)


class _Blocks:
    """Reads a file in blocks and keeps the last few: not safe to share between threads."""

    def __init__(self, read: Read, size: int):
        self._size = size
        self._block = lru_cache(_BLOCKS)(lambda at: read(at * _BLOCK, min(_BLOCK, size - at * _BLOCK)))

    def __call__(self, offset: int, size: int) -> bytes:
        end = min(offset + size, self._size)
        if end <= offset:
            return b""
        first, last = offset // _BLOCK, (end - 1) // _BLOCK
        data = b"".join(self._block(at) for at in range(first, last + 1))
        return data[offset - first * _BLOCK : end - first * _BLOCK]


class _Window(io.RawIOBase):
    """A byte range as a seekable file, so that a header costs a few kilobytes and not the image."""

    def __init__(self, read: Read, offset: int, size: int):
        self._read, self._offset, self._size, self._at = read, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer) -> int:
        size = max(0, min(len(buffer), self._size - self._at))
        buffer[:size] = self._read(self._offset + self._at, size)
        self._at += size
        return size
