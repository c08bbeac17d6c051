"""WebDataset shards: find the members of a tar once, then read them by offset."""

import os
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from nemo_bluelm.errors import UserError


class Member(NamedTuple):
    """Where a file lies in its tar: ``size`` bytes from ``offset``."""

    offset: int
    size: int


def scan_shard(path: Path) -> dict[str, dict[str, Member]]:
    """Members of a tar as {key: {extension: Member}}, in the tar's order.

    As in WebDataset the key is the path up to the first dot of the file name, the extension all that follows it.

    Raises:
        UserError: unreadable, compressed, truncated or not a tar; a member twice or without extension.
    """
    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if not info.isreg():
                    continue
                folder, _, file = info.name.rpartition("/")
                stem, _, extension = file.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not stem or not extension:
                    raise UserError(f"{path}: member {info.name!r} is not named KEY.EXTENSION; rename it")
                members = samples.setdefault(key, {})
                if extension in members:
                    raise UserError(f"{path}: member {info.name!r} is there twice; write the shard again")
                members[extension] = Member(info.offset_data, info.size)
            end = tar.offset
        with open(path, "rb") as file:
            whole = os.pread(file.fileno(), tarfile.BLOCKSIZE, end) == bytes(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a whole uncompressed tar ({error}); write the shard again") from error
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error
    # tarfile takes a cut between two members, or rubbish after one, for the end; the zero block proves it.
    if not whole:
        raise UserError(f"{path} is truncated or damaged: no end-of-archive mark at byte {end}; write the shard again")
    return samples


class ShardReader:
    """Reads members by offset; keeps the last used shards open. Safe to share between threads."""

    def __init__(self, root: Path, max_open: int = 64):
        self._open = lru_cache(max_open)(lambda shard: _File(Path(root) / shard))

    def read(self, shard: str, member: Member) -> bytes:
        """Raises UserError when the shard is gone or shorter than it was."""
        data = os.pread(self._open(shard).fd, member.size, member.offset)
        if len(data) != member.size:
            raise UserError(f"{shard} is shorter than when it was indexed; restore it, or start the run again")
        return data


class _File:
    """A file descriptor that closes with its last reader, so that eviction never closes it under one."""

    def __init__(self, path: Path):
        self.fd = -1
        try:
            self.fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror}") from error

    def __del__(self):
        if self.fd >= 0:
            os.close(self.fd)
