"""Corpus part: pairs of answers for a reward model, the right one and one that is wrong."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from nemo_bluelm.data.files import expand
from nemo_bluelm.data.records import read_records
from nemo_bluelm.data.writer import RawSample, write_shard
from nemo_bluelm.errors import UserError

SPLITS = {
    "digits-train": "digits-train-*.tar",
    "digits-test": "digits-test.tar",
    "problems-train": "sft-train-*.tar",
    "problems-test": "reasoning-test.tar",
}
_OTHER_TAGS = {"train", "test", "direct", "think", "short", "sft", "reasoning"}  # they say nothing of what is asked


class _Question(NamedTuple):
    kind: tuple[str, ...]
    message: dict
    answer: str
    images: dict[str, bytes]


def write_preferences(corpus: Path, out: Path, seed: int) -> dict[str, int]:
    """Write ``digits-train.tar``, ``digits-test.tar``, ``problems-train.tar`` and ``problems-test.tar``.

    They have every question of the corpus' shards once, its answer, and a wrong one: the right one to another question
    of the same kind; where things are sorted, the right one with two numbers exchanged; where two numbers are compared,
    the smaller one.

    Args:
        out: a new folder.

    Returns:
        Pairs by shard.

    Raises:
        UserError: the corpus has no such shards.
    """
    out.mkdir()
    counts = {}
    for name, pattern in SPLITS.items():
        questions = _questions(corpus, pattern)
        rng = Random(f"{name}/{seed}")
        samples = [_sample(f"{name}-{i:06d}", one, questions, rng) for i, one in enumerate(questions)]
        write_shard(out / f"{name}.tar", samples)
        counts[name] = len(samples)
    return counts


def _questions(corpus: Path, pattern: str) -> list[_Question]:
    found: dict[tuple, _Question] = {}
    for shard in expand(str(corpus), [pattern]):
        for _, record, images in read_records(corpus / shard):
            query, reply = record.messages
            kind = tuple(tag for tag in record.tags if tag not in _OTHER_TAGS)
            one = _Question(kind, query, reply["content"], dict(zip(record.images, images)))
            if bool(images) == ("digits" in one.kind):  # problems about images are not in training
                found.setdefault((json.dumps(query), *images), one)
    return list(found.values())


def _sample(key: str, one: _Question, questions: Sequence[_Question], rng: Random) -> RawSample:
    pair = {"messages": [one.message], "chosen": one.answer, "rejected": _wrong(one, questions, rng)}
    record = pair | ({"images": list(one.images)} if one.images else {}) | {"tags": list(one.kind)}
    return RawSample(key, record, one.images)


def _wrong(one: _Question, questions: Sequence[_Question], rng: Random) -> str:
    if "sorting" in one.kind:
        numbers = one.answer.split()
        a, b = rng.sample(range(len(numbers)), 2)
        numbers[a], numbers[b] = numbers[b], numbers[a]
        return " ".join(numbers)
    if "comparison" in one.kind:
        numbers = [word.strip(",?") for word in one.message["content"].split()]
        return next(word for word in numbers if word.isdigit() and word != one.answer)
    others = [other.answer for other in questions if other.kind == one.kind and other.answer != one.answer]
    if not others:
        raise UserError(f"all questions of the kind {', '.join(one.kind)} have the answer {one.answer!r}; make more")
    return rng.choice(others)  # as often as it is right, or its frequency alone would tell
