"""Records of a task's data as prompts: JSONL or WebDataset tars, one record at a time."""

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any, Optional

from nemo_bluelm.data.chat import Message
from nemo_bluelm.data.groups import MAX_RECORD, Group
from nemo_bluelm.data.records import Record, find_images
from nemo_bluelm.data.shards import Files, ReadError, Torn, expand, is_tar, scan
from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.budgets import expected
from nemo_bluelm.evaluate.tasks import Marker, Task
from nemo_bluelm.evaluate.template import compiled

IMAGES = "images"  # field of a record: names of its images, as in the records for training
_PLACE = f"<image {uuid.uuid4()}>"  # what {{ image }} becomes for a moment; no record can have it


@dataclass(frozen=True)
class Sample:
    """``key`` is unique in the data, and another one if the record changes; ``where`` tells a person the place;
    ``fields`` are for the scorers."""

    key: str
    where: str
    messages: Sequence[Message]
    images: tuple[bytes, ...]
    fields: dict[str, Any]


@dataclass(frozen=True)
class Skipped:
    """A record that can't be asked, or the rest of a file that can't be read."""

    where: str
    reason: str


def find_data(patterns: Sequence[str]) -> list[str]:
    """The files, sorted.

    Raises:
        UserError: a pattern without a file.
    """
    return expand(".", patterns)


def read_samples(paths: Sequence[str], task: Task, marker: Marker) -> Iterator[Sample | Skipped]:
    """Every record of the files, in their order.

    Args:
        paths: as :func:`find_data` gives them.
        marker: one of its scorers must apply to a record.
    """
    files = Files()
    for path in paths:
        try:
            for group in scan(path, files):
                place = f"{path}: sample {group.key}" if is_tar(path) else f"{path}: line {group.key}"
                try:
                    yield _sample(files, path, group, place, task, marker)
                except UserError as error:
                    yield Skipped(place, str(error))
        except (Torn, ReadError) as error:
            yield Skipped(path, str(error))


def _sample(files: Files, path: str, group: Group, place: str, task: Task, marker: Marker) -> Sample:
    read = partial(files.read, path)
    fields = _fields(read, group)
    if task.prompt is None:
        record = Record.parse(json.dumps(fields, ensure_ascii=False).encode())
        if not record.messages or len(record.messages) < 2:
            raise UserError("it is no conversation with an answer; a task for other records needs a prompt")
        messages = record.messages[:-1]
        fields = {**fields, "answer": expected(record)}
    else:
        names = _names(fields)
        record = Record(images=names)
        text = compiled(task.prompt, "prompt").render({**fields, "image": _PLACE})
        messages = [{"role": "user", "content": _content(text.strip(), len(names))}]
    marker.check(fields)
    images = tuple(files.read(image.file, *image.member) for image in find_images(files, path, group, record))
    return Sample(f"{path}#{group.key}@{_digest(fields, images)}", place, messages, images, fields)


def _digest(fields: dict[str, Any], images: Sequence[bytes]) -> str:
    """Of all that a record has: once it is another, results of the one before are not its own."""
    digest = sha256(json.dumps(fields, sort_keys=True).encode())
    for image in images:
        digest.update(sha256(image).digest())
    return digest.hexdigest()[:16]


def _fields(read: Any, group: Group) -> dict[str, Any]:
    if group.bad:
        raise UserError(group.bad)
    member = group.members.get("json")
    if member is None:
        raise UserError(f"it has no member {group.key}.json")
    if member.size > MAX_RECORD:
        raise UserError(f"its JSON has {member.size:,} bytes, more than {MAX_RECORD:,}")
    try:
        fields = json.loads(read(*member))
    except (ValueError, RecursionError) as error:
        raise UserError(f"the JSON is invalid: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"the JSON is {fields!r:.60}; it must be an object")
    return fields


def _names(fields: dict[str, Any]) -> tuple[str, ...]:
    names = fields.get(IMAGES) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{IMAGES} is {names!r:.60}; it must be a list of the images' names")
    return tuple(names)


def _content(text: str, images: int) -> str | list[dict]:
    """Parts of a message: the text with images in their places, or before it where it has no place for any."""
    image: dict = {"type": "image"}
    texts: Optional[list[str]] = text.split(_PLACE)
    if len(texts) == 1:
        parts = [image] * images + [{"type": "text", "text": text}]
    else:
        parts = [part for piece in texts for part in ({"type": "text", "text": piece}, image)][:-1]
    parts = [part for part in parts if part.get("text") != ""]
    if (places := sum(part is image for part in parts)) != images:
        raise UserError(f"the prompt has places for {places} images, the record has {images}")
    return parts or ""
