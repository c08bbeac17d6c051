"""Records: the JSON of a sample, checked and turned into tokens."""

import json
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from nemo_bluelm.config.schema import ControlToken
from nemo_bluelm.data.chat import Encoded, Message, encode_conversation, encode_document
from nemo_bluelm.data.files import Files, NotFound, Read
from nemo_bluelm.data.groups import MAX_RECORD, Group, Member
from nemo_bluelm.data.shards import is_tar, scan
from nemo_bluelm.data.tokenizer import SPECIAL_NAMES, Tokenizer
from nemo_bluelm.errors import UserError

VERSION = 2  # raise it with any change of what a record means: it makes old indexes stale

_SHAPES = ("messages", "document", "text")
_CONTROL_TOKEN = SPECIAL_NAMES["blue_think"]


@dataclass(frozen=True)
class Record:
    """A conversation, a document of text and images in turns, or a plain text.

    ``{"messages": [...], "images": ["0.png", ...]}``, ``{"document": [...], "images": [...]}`` or ``{"text": "..."}``,
    each with optional ``"tags": [...]`` and ``"id"``. ``images`` names, in the order of the image parts, members of the
    same sample of a tar (``KEY.0.png``), or for JSONL files beside it.
    """

    messages: list[Message] | None = None
    document: list[dict] | None = None
    text: str | None = None
    images: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    id: str | None = None

    @classmethod
    def parse(cls, data: bytes) -> "Record":
        """
        Raises:
            UserError: anything but the three shapes above; the control token spelt out, which would be learnt as
                ordinary text, so that the real one would never switch thinking on.
        """
        if _CONTROL_TOKEN.encode() in data:  # JSON has no need to escape its characters
            raise UserError(
                f"its text spells out {_CONTROL_TOKEN}, which only training may place; remove it, and give what was "
                'thought as "thinking" of the assistant\'s message'
            )
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the JSON is invalid: {error}") from error
        if not isinstance(fields, dict):
            raise UserError(f"the JSON is {fields!r:.60}; it must be an object with {', '.join(_SHAPES)}")
        shapes = [shape for shape in _SHAPES if shape in fields]
        if len(shapes) != 1:
            raise UserError(f"the JSON has the keys {sorted(fields)!s:.200}; it must have one of {', '.join(_SHAPES)}")
        allowed = {*shapes, "tags", "id"} | (set() if shapes == ["text"] else {"images"})
        if unknown := sorted(set(fields) - allowed):
            raise UserError(f"the JSON has the unknown key {unknown[0]!r:.60}; allowed are {sorted(allowed)}")
        if "text" in fields and (not isinstance(fields["text"], str) or not fields["text"]):
            raise UserError(f"text is {fields['text']!r:.60}; it must be text that isn't empty")
        if "document" in fields and not isinstance(fields["document"], list):
            raise UserError(f"document is {fields['document']!r:.60}; it must be a list of parts")
        for key in ("images", "tags"):
            value = fields.get(key, [])
            if not isinstance(value, list) or not all(isinstance(item, str) and _is_unicode(item) for item in value):
                raise UserError(f"{key} is {value!r:.60}; it must be a list of strings")
        return cls(
            fields.get("messages"),
            fields.get("document"),
            fields.get("text"),
            tuple(fields.get("images", ())),
            tuple(fields.get("tags", ())),
            _id(fields),
        )

    def encode(
        self,
        tokenizer: Tokenizer,
        image_tokens: Sequence[int],
        control_token: ControlToken = ControlToken.after_query,
    ) -> Encoded:
        """The whole record as one document; ``image_tokens[i]`` visual tokens for image i."""
        if self.messages is not None:
            return encode_conversation(self.messages, tokenizer, image_tokens, control_token)
        return encode_document(self.text if self.document is None else self.document, tokenizer, image_tokens)


class ImageFile(NamedTuple):
    """Where an image of a record lies: in its shard, or in a file of its own."""

    name: str
    file: str
    member: Member


def load_record(read: Read, group: Group) -> tuple[Record, bytes]:
    """The record of one sample and its JSON bytes.

    Args:
        read: reads the shard.

    Raises:
        UserError: the group is no sample, it has no JSON, or an invalid one.
    """
    if group.bad:
        raise UserError(group.bad)
    if "json" not in group.members:
        raise UserError(f"it has no member {group.key}.json; add it or remove the sample")
    member = group.members["json"]
    if member.size > MAX_RECORD:
        raise UserError(f"its JSON has {member.size:,} bytes, more than {MAX_RECORD:,}; split it")
    data = read(*member)
    return Record.parse(data), data


def find_images(files: Files, shard: str, group: Group, record: Record) -> list[ImageFile]:
    """The images that a record names, in its order.

    Raises:
        UserError: one is missing or, in a tar, left over; a path that leaves the JSONL's folder.
    """
    if not is_tar(shard):
        return [_loose(files, shard, name) for name in record.images]
    for name in record.images:
        if name not in group.members or name == "json":
            raise UserError(f"it has no member {group.key}.{name}, its image; add it or remove the sample")
    if unused := sorted(set(group.members) - {"json", *record.images}):
        raise UserError(f"it has the member {group.key}.{unused[0]} that its images don't name; name it or remove it")
    return [ImageFile(name, find_file(shard, name), group.members[name]) for name in record.images]


def find_file(shard: str, image: str) -> str:
    """The file that holds an image of a shard's record, named as the shard is."""
    if is_tar(shard):
        return shard
    folder, slash, _ = shard.rpartition("/")
    return folder + slash + posixpath.normpath(image)


@contextmanager
def located(where: str) -> Iterator[None]:
    """Puts the place in front of a UserError's message."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def read_records(path: str | Path) -> Iterator[tuple[str, Record, list[bytes]]]:
    """Every (key, record, image bytes) of one shard, in its order: for evaluation and inspection.

    Raises:
        UserError: naming shard and sample: as :func:`scan`, :func:`load_record` and :func:`find_images`.
    """
    files, shard = Files(), str(path)
    for group in scan(shard, files):
        with located(f"{shard}: sample {group.key!r}"):
            record, _ = load_record(partial(files.read, shard), group)
            images = find_images(files, shard, group, record)
            data = [files.read(image.file, *image.member) for image in images]
        yield record.id or group.key, record, data


def _loose(files: Files, shard: str, name: str) -> ImageFile:
    path = posixpath.normpath(name)
    if not name or posixpath.isabs(name) or "://" in name or path.split("/")[0] in ("..", "."):
        raise UserError(f"its image {name!r:.200} is no path below the folder of the JSONL; move it there")
    file = find_file(shard, name)
    try:
        return ImageFile(name, file, Member(0, files.stat(file).size))
    except NotFound as error:
        raise UserError(f"its image {error}") from error  # the sample is bad, the shard can be read


def _id(fields: dict) -> str | None:
    value = fields.get("id")
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return None if value is None else str(value)
    if not isinstance(value, str) or not value or not _is_unicode(value):
        raise UserError(f"id is {value!r:.60}; it must be text that isn't empty, or a whole number")
    return value


def _is_unicode(text: str) -> bool:
    """Whether it has no lone surrogates, which JSON can write and no file can store."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
