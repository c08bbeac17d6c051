"""Records: the JSON member of a sample, checked and turned into tokens."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nemo_bluelm.data.chat import Encoded, Message, encode_conversation, encode_document
from nemo_bluelm.data.shards import Member, ShardReader, scan_shard
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError


@dataclass(frozen=True)
class Record:
    """A conversation or a plain text.

    ``{"messages": [...], "images": ["0.png", ...]}`` or ``{"text": "..."}``, each with optional ``"tags": [...]``.
    ``images`` names members of the same sample: ``KEY.0.png``.
    """

    messages: list[Message] | None
    text: str | None
    images: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @classmethod
    def parse(cls, data: bytes) -> "Record":
        """Raises UserError for anything but the two shapes above."""
        try:
            fields = json.loads(data)
        except ValueError as error:
            raise UserError(f"the JSON is invalid: {error}") from error
        if not isinstance(fields, dict):
            raise UserError(f"the JSON is {fields!r:.60}; it must be an object with messages or text")
        if ("messages" in fields) == ("text" in fields):
            raise UserError(f"the JSON has the keys {sorted(fields)}; it must have either messages or text")
        allowed = {"messages", "images", "tags"} if "messages" in fields else {"text", "tags"}
        if unknown := sorted(set(fields) - allowed):
            raise UserError(f"the JSON has the unknown key {unknown[0]!r}; allowed are {sorted(allowed)}")
        if "text" in fields and (not isinstance(fields["text"], str) or not fields["text"]):
            raise UserError(f"text is {fields['text']!r:.60}; it must be text that isn't empty")
        for key in ("images", "tags"):
            value = fields.get(key, [])
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise UserError(f"{key} is {value!r:.60}; it must be a list of strings")
        images, tags = tuple(fields.get("images", ())), tuple(fields.get("tags", ()))
        return cls(fields.get("messages"), fields.get("text"), images, tags)

    def encode(self, tokenizer: Tokenizer, image_tokens: Sequence[int]) -> Encoded:
        """The whole record as one document; ``image_tokens[i]`` visual tokens for image i."""
        if self.messages is None:
            return encode_document(self.text, tokenizer)
        return encode_conversation(self.messages, tokenizer, image_tokens)


def load_record(reader: ShardReader, shard: str, key: str, members: dict[str, Member]) -> tuple[Record, bytes]:
    """The record of one sample and its JSON bytes.

    Raises:
        UserError: naming shard and sample: no JSON, an invalid one, or an image member missing or left over.
    """
    where = f"{shard}: sample {key!r}"
    if "json" not in members:
        raise UserError(f"{where} has no member {key}.json; add it or remove the sample")
    data = reader.read(shard, members["json"])
    with located(where):
        record = Record.parse(data)
    for name in record.images:
        if name not in members or name == "json":
            raise UserError(f"{where} has no member {key}.{name}, its image; add it or remove the sample")
    if unused := sorted(set(members) - {"json", *record.images}):
        raise UserError(f"{where} has the member {key}.{unused[0]} that its images don't name; name it or remove it")
    return record, data


@contextmanager
def located(where: str) -> Iterator[None]:
    """Puts the place in front of a UserError's message."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def read_records(path: Path) -> Iterator[tuple[str, Record, list[bytes]]]:
    """Every (key, record, image bytes) of one shard, in its order: for evaluation and inspection.

    Raises:
        UserError: as :func:`scan_shard` and :func:`load_record`.
    """
    path = Path(path)
    reader = ShardReader(path.parent)
    for key, members in scan_shard(path).items():
        record, _ = load_record(reader, path.name, key, members)
        yield key, record, [reader.read(path.name, members[name]) for name in record.images]
