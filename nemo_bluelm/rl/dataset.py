"""Prompts to reply to: NeMo-Aligner's AllTaskDataset on JSONL files and WebDataset tars."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import numpy as np

from nemo_bluelm.config.schema import DataConfig
from nemo_bluelm.data.chat import Message
from nemo_bluelm.data.files import Files, expand, join
from nemo_bluelm.data.groups import MAX_RECORD, Group
from nemo_bluelm.data.order import SourceOrder
from nemo_bluelm.data.records import Record, find_images
from nemo_bluelm.data.shards import is_tar, scan
from nemo_bluelm.errors import UserError
from nemo_bluelm.rl.environments.base import Episode

if TYPE_CHECKING:  # it imports torch
    from nemo_bluelm.generate.request import Reply

_TEXTS = ("prompt", "problem")  # NeMo-Aligner's names of a prompt that is one text


@dataclass(frozen=True)
class Task:
    """A prompt and what its rewards need.

    Attributes:
        uid: of the draw, unique in the run; a group of replies has it in common.
        fields: of the record; ``args`` are among them, each by its name.
    """

    uid: int
    source: str
    task_name: str
    messages: Sequence[Message]
    images: tuple[bytes, ...]
    fields: dict[str, Any]

    def episode(self, reply: "Reply", think: Optional[bool]) -> Episode:
        """A reply to it, for its rewards."""
        return Episode(self.task_name, self.fields, reply, think, self.messages, self.images)


class Curriculum(NamedTuple):
    """Prompts are drawn from the easiest of their source first, from ever more, and at last from all.

    Attributes:
        field: of a record, a number; the harder its prompt the larger.
        start: share of the prompts that the first are drawn from.
        prompts: draws of all sources together until it is all of them.
    """

    field: str
    start: float
    prompts: int

    def share(self, drawn: int) -> float:
        """Of a source's prompts, after so many draws."""
        return min(1.0, self.start + (1 - self.start) * drawn / self.prompts)


class _Place(NamedTuple):
    shard: str
    group: Group
    task_name: str
    difficulty: float


class AllTaskDataset:
    """The prompts of a recipe's sources, drawn by their weights without end.

    A record is ``{"task_name": ..., "prompt" or "problem": text, ...}``, or has ``"messages"`` that end with the user's
    turn or, as in the records for training, with the answer, which becomes its ``answer``. ``images`` names its images
    as in those; they stand before the text of a prompt. ``args`` and all other fields are for the rewards. A source
    whose records have no ``task_name`` gets that of its own name.

    Args:
        data: of the recipe; ``sources`` are weighed by prompts.
        seed: of the order, a pure function of it and of how many prompts were drawn.
        key: of the recipe that names the sources, for messages.
        curriculum: None draws all prompts of a source alike.

    Raises:
        UserError: no such file, or a record that is none, naming it.
    """

    def __init__(self, data: DataConfig, seed: int, key: str = "data.sources", curriculum: Optional[Curriculum] = None):
        self._files, self._curriculum = Files(), curriculum  # of no root: shards are named with theirs
        self._sources: dict[str, list[_Place]] = {}
        for name, source in data.sources.items():
            try:
                shards = [join(data.root, shard) for shard in expand(data.root, source.shards)]
                self._sources[name] = [place for shard in shards for place in self._places(shard, name)]
            except UserError as error:
                raise UserError(f"{key}.{name}: {error}") from error
            if not self._sources[name]:
                raise UserError(f"{key}.{name} has no records; name other shards")
            self._sources[name].sort(key=lambda place: place.difficulty)  # those of one difficulty stay as they are
        self._weights = {name: source.weight for name, source in data.sources.items()}
        self._orders = {name: SourceOrder(seed, name, np.ones(len(places))) for name, places in self._sources.items()}
        self._drawn = dict.fromkeys(self._sources, 0)

    @property
    def task_names(self) -> set[str]:
        return {place.task_name for places in self._sources.values() for place in places}

    @property
    def sees_images(self) -> bool:
        places = (place for places in self._sources.values() for place in places)
        return any(len(place.group.members) > 1 or not is_tar(place.shard) for place in places)

    def __len__(self) -> int:
        return sum(map(len, self._sources.values()))

    def draw(self) -> Task:
        """The next prompt: of the source that is furthest behind its weight."""
        name = min(self._drawn, key=lambda source: (self._drawn[source] + 1) / self._weights[source])
        uid, position = sum(self._drawn.values()), self._drawn[name]
        self._drawn[name] += 1
        place = int(self._orders[name].draw(position, 1)[0])
        return self._task(uid, name, int(place * self._curriculum.share(uid)) if self._curriculum else place)

    def first(self, count: int) -> list[Task]:
        """``count`` prompts at most, as many of each source, in the order of their files."""
        each = max(1, count // len(self._sources))
        places = [(name, index) for name, some in self._sources.items() for index in range(min(each, len(some)))]
        return [self._task(uid, *place) for uid, place in enumerate(places)]

    def state(self) -> dict[str, int]:
        """Prompts drawn so far, by source."""
        return dict(self._drawn)

    def restore(self, state: dict[str, int]) -> None:
        """Go on after :meth:`state`."""
        self._drawn = {name: state[name] for name in self._drawn}

    def _places(self, shard: str, source: str) -> list[_Place]:
        found = []
        for group in scan(shard, self._files):
            fields = self._fields(shard, group)
            found.append(
                _Place(shard, group, str(fields.get("task_name", source)), self._difficulty(fields, shard, group))
            )
            self._messages(fields, _where(shard, group))
        return found

    def _task(self, uid: int, source: str, index: int) -> Task:
        shard, group, task_name, _ = self._sources[source][index]
        fields, where = self._fields(shard, group), _where(shard, group)
        messages, names = self._messages(fields, where)
        try:
            images = find_images(self._files, shard, group, Record(images=names))
            data = tuple(self._files.read(image.file, *image.member) for image in images)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        return Task(uid, source, task_name, messages, data, _flat(fields))

    def _difficulty(self, fields: dict[str, Any], shard: str, group: Group) -> float:
        if self._curriculum is None:
            return 0.0
        value = _flat(fields).get(self._curriculum.field)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(
                f"{_where(shard, group)}: {self._curriculum.field} is {value!r:.60}; grpo.curriculum needs a number"
            )
        return float(value)

    def _fields(self, shard: str, group: Group) -> dict[str, Any]:
        member = group.members.get("json")
        problem = group.bad or (None if member else "it has no JSON")
        problem = problem or (f"its JSON has {member.size:,} bytes" if member.size > MAX_RECORD else None)
        if problem:
            raise UserError(f"{_where(shard, group)}: {problem}; remove it")
        try:
            fields = json.loads(partial(self._files.read, shard)(*member))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{_where(shard, group)}: the JSON is invalid: {error}") from error
        if not isinstance(fields, dict):
            raise UserError(f"{_where(shard, group)}: the JSON is {fields!r:.60}; it must be an object")
        return fields

    def _messages(self, fields: dict[str, Any], where: str) -> tuple[list[Message], tuple[str, ...]]:
        """The conversation up to the user's last turn, and the names of its images."""
        names = fields.get("images") or ()
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{where}: images is {names!r:.60}; it must be a list of file names")
        names = tuple(names)
        messages = fields.get("messages")
        if messages is None:
            text = next((fields[name] for name in _TEXTS if isinstance(fields.get(name), str)), None)
            if text is None:
                raise UserError(f"{where}: it has no messages, prompt or problem; add one")
            if not names:
                return [{"role": "user", "content": text}], names
            parts = [*({"type": "image"} for _ in names), {"type": "text", "text": text}]
            return [{"role": "user", "content": parts}], names
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise UserError(f"{where}: messages is {messages!r:.60}; it must be a list of turns")
        if messages and messages[-1].get("role") == "assistant":
            fields.setdefault("answer", messages[-1].get("content"))
            messages = messages[:-1]
        if not messages or messages[-1].get("role") != "user":
            raise UserError(f"{where}: its messages don't end with the user's turn, or an answer to it; mend them")
        return messages, names


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    args = fields.get("args")
    return {**fields, **args} if isinstance(args, dict) else fields


def _where(shard: str, group: Group) -> str:
    return f"{shard}: sample {group.key}" if is_tar(shard) else f"{shard}: line {group.key}"
