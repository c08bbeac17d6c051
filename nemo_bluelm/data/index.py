"""The index: place, token count and tile count of every sample, known before any pixel is read."""

import glob
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bluelm.data.images import image_size
from nemo_bluelm.data.records import load_record, located
from nemo_bluelm.data.shards import Member, ShardReader, scan_shard
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry


@dataclass(frozen=True)
class ImageEntry:
    """An image member and its size in pixels after EXIF orientation."""

    name: str
    member: Member
    width: int
    height: int


@dataclass(frozen=True)
class Sample:
    """A conversation, a text, or one piece of a long text.

    It is ``tokens`` tokens from ``start`` of the encoded record, image tokens included, with ``tiles`` tiles.
    ``digest`` is the SHA-256 of the JSON.
    """

    shard: str  # path, relative to data.root where it lies below it
    key: str
    start: int
    tokens: int
    tiles: int
    json: Member
    images: tuple[ImageEntry, ...]
    digest: str

    @property
    def where(self) -> str:
        return f"{self.shard}: sample {self.key!r}"


def build_index(data: Any, tokenizer: Tokenizer, geometry: Geometry) -> dict[str, list[Sample]]:
    """Scan the shards of every source: headers and JSON only, no pixels.

    A text longer than ``data.sequence_length`` becomes pieces that overlap by one token: the last token of a piece is
    the first of the next, so every token is a target once.

    Args:
        data: a ``DataConfig`` or a node with its keys.

    Returns:
        Samples by source, in the order of the sorted shards and of their members.

    Raises:
        UserError: a pattern without shards; a broken shard, JSON or image header; an image member missing; a
            conversation above ``data.sequence_length`` or ``data.max_tiles``; a source without samples.
    """
    root = Path(data.root)
    if not root.is_dir():
        raise UserError(f"data.root {root} is not a folder; set it to the one that holds the shards")
    if data.sequence_length < 2:
        raise UserError(f"data.sequence_length is {data.sequence_length}; it must be 2 or more")
    if not data.sources:
        raise UserError("data.sources is empty; name at least one source with its shards")
    indexer = _Indexer(data.sequence_length, data.max_tiles, tokenizer, geometry, ShardReader(root))
    index = {}
    for name, source in data.sources.items():
        samples: list[Sample] = []
        for shard in find_shards(root, source.shards, f"data.sources.{name}.shards"):
            for key, members in scan_shard(root / shard).items():
                samples += indexer.samples(shard, key, members)
        if not samples:
            raise UserError(f"data.sources.{name} has no samples: its shards are empty; remove it or name other shards")
        index[name] = samples
    return index


def find_shards(root: Path, patterns: Sequence[str], config_key: str) -> list[str]:
    """Sorted files that match the patterns, without doubles, relative to ``root`` where below it.

    Raises:
        UserError: no pattern at all, or one that matches no file.
    """
    if not patterns:
        raise UserError(f"{config_key} is empty; name at least one shard")
    shards: set[str] = set()
    for pattern in patterns:
        matches = glob.glob(os.path.join(glob.escape(str(root)), pattern), recursive=True)
        found = [Path(match) for match in matches if os.path.isfile(match)]
        if not found:
            raise UserError(f"{config_key}: {pattern!r} matches no file in data.root {root}; correct one of them")
        shards |= {str(path.relative_to(root)) if path.is_relative_to(root) else str(path) for path in found}
    return sorted(shards)


def image_token_counts(images: Sequence[ImageEntry], geometry: Geometry) -> list[int]:
    """Visual tokens of each image."""
    return [geometry.image_tokens(image.width, image.height) for image in images]


@dataclass(frozen=True)
class _Indexer:
    sequence_length: int
    max_tiles: int
    tokenizer: Tokenizer
    geometry: Geometry
    reader: ShardReader

    def samples(self, shard: str, key: str, members: dict[str, Member]) -> list[Sample]:
        """The samples of one record: one, or the pieces of a long text."""
        record, payload = load_record(self.reader, shard, key, members)
        with located(f"{shard}: sample {key!r}"):
            images = tuple(self._image(shard, key, name, members[name]) for name in record.images)
            tiles = sum(self.geometry.tiles(image.width, image.height) for image in images)
            encoded = record.encode(self.tokenizer, image_token_counts(images, self.geometry))
            length, limit = len(encoded.tokens), self.sequence_length
            if tiles > self.max_tiles:
                raise UserError(
                    f"{tiles} tiles, more than data.max_tiles {self.max_tiles}; raise it or scale the images down"
                )
            if length > limit and record.text is None:
                raise UserError(
                    f"{length} tokens, more than data.sequence_length {limit}; raise it or shorten the conversation"
                )
        digest = hashlib.sha256(payload).hexdigest()
        return [
            Sample(shard, key, start, min(limit, length - start), tiles, members["json"], images, digest)
            for start in range(0, length - 1, limit - 1)
        ]

    def _image(self, shard: str, key: str, name: str, member: Member) -> ImageEntry:
        stream = io.BufferedReader(_MemberStream(self.reader, shard, member), 4096)
        width, height = image_size(stream, f"image {key}.{name}")
        return ImageEntry(name, member, width, height)


class _MemberStream(io.RawIOBase):
    """A member as a seekable file, so that a header costs a few kilobytes and not the image."""

    def __init__(self, reader: ShardReader, shard: str, member: Member):
        self._reader, self._shard, self._member, self._at = reader, shard, member, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._member.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer) -> int:
        size = max(0, min(len(buffer), self._member.size - self._at))
        buffer[:size] = self._reader.read(self._shard, Member(self._member.offset + self._at, size))
        self._at += size
        return size
