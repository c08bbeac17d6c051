"""Shards: find the members of every sample once, in bounded memory; they are read by offset from then on."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from nemo_bluelm.data.files import Files, ReadError, expand, join
from nemo_bluelm.data.groups import Group, Member, Torn
from nemo_bluelm.data.jsonl import SUFFIX as JSONL
from nemo_bluelm.data.jsonl import scan_jsonl

__all__ = ["Files", "Group", "Member", "ReadError", "Torn", "expand", "is_tar", "join", "scan"]

_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, IndexError, RecursionError)  # of damaged headers
_MAX_EXTENSION = 1 << 20  # bytes of a long name or a pax header, which are read whole


def is_tar(path: str) -> bool:
    """Whether a shard is a tar: all are but ``.jsonl``."""
    return not path.endswith(JSONL)


def scan(path: str, files: Files | None = None) -> Iterator[Group]:
    """The samples of a shard, in its order.

    In a tar, consecutive members with one key are a sample. As in WebDataset the key is the path up to the first dot
    of the file name, the extension all that follows it. A sample counts as whole once the next one or the
    end-of-archive mark proves that nothing of it is missing.

    Args:
        path: a tar or ``.jsonl``; local, relative to the root of ``files``, or a URL.

    Raises:
        Torn: after the last whole sample: the shard is cut, damaged, compressed or no tar.
        ReadError: the shard can't be read.
    """
    with (files or Files()).open(path) as file:
        try:
            yield from _scan_tar(file, path) if is_tar(path) else scan_jsonl(file, path)
        except OSError as error:
            raise ReadError(f"{path} can't be read: {error.strerror or error}") from error


def _scan_tar(file: BinaryIO, path: str) -> Iterator[Group]:
    try:
        yield from _groups(file)
    except _TAR_ERRORS as error:
        file.seek(0)
        offset, reason = _explain(file.read(6), error)
        raise Torn(path, offset, reason) from error


def _groups(file: BinaryIO) -> Iterator[Group]:
    group: Group | None = None
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
        while (info := _next(tar, group)) is not None:
            if not info.isreg():
                continue
            key, extension = _split(info.name)
            if group is not None and key != group.key:
                yield group
                group = None
            if group is None:
                group = Group(key, info.offset, {})
            if extension is None:
                group = group._replace(bad=f"its member {key!r} is not named KEY.EXTENSION; rename it")
            elif extension in group.members:
                group = group._replace(bad=f"its member {key}.{extension} is there twice; write the shard again")
            else:
                group.members[extension] = Member(info.offset_data, info.size)
        end = tar.offset
    # tarfile takes a cut between two members, or rubbish after one, for the end; the zero block proves it.
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise _Cut(group.offset if group else end, "no end-of-archive mark")
    if group is not None:
        yield group
    while rest := file.read(1 << 20):
        if rest.strip(b"\0"):
            raise _Cut(end, "more data follows the end-of-archive mark")


class _Header(tarfile.TarInfo):
    """A header whose extension fits into memory."""

    _EXTENSIONS = (
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
    )

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in self._EXTENSIONS and self.size > _MAX_EXTENSION:
            raise tarfile.SubsequentHeaderError(f"a header with an extension of {self.size:,} bytes")
        return super()._proc_member(tar)


def _next(tar: tarfile.TarFile, group: Group | None) -> tarfile.TarInfo | None:
    try:
        info = tar.next()
        if info is not None and tar.offset <= info.offset:
            raise ValueError("a header with a negative size")  # tarfile would go back to it for ever
    except _TAR_ERRORS as error:
        raise _Cut(group.offset if group else tar.offset, str(error)) from error
    tar.members.clear()  # it keeps every member it has met
    return info


class _Cut(tarfile.TarError):
    """The samples from ``offset`` on are lost."""

    def __init__(self, offset: int, reason: str):
        super().__init__(reason)
        self.offset = offset


def _explain(start: bytes, error: Exception) -> tuple[int, str]:
    """(offset, reason) of a tar that doesn't read to its end."""
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            return 0, f"it is compressed with {name}; decompress it"
    if isinstance(error, _Cut):
        return error.offset, f"{error}; write the shard again"
    return 0, f"not a tar ({error})"


def _split(name: str) -> tuple[str, str | None]:
    """(key, extension) of a member; without an extension, or without a name before it, (path, None)."""
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    if not stem or not extension:
        return name, None
    return (f"{folder}/{stem}" if folder else stem), extension
