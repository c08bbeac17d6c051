"""Data for GRPO to learn from: what a model is taught badly first, and what is asked of it then.

Sums of a handwritten digit and a number, which a rule can verify; greetings, of which a reward model knows the better.
"""

import io
import json
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from nemo_bluelm.data.corpus_digits import split_digits
from nemo_bluelm.data.writer import RawSample, question_record, write_shard

NAMES = ("Anna", "Ben", "Chen", "Dana", "Eli", "Fang", "Gita", "Hugo")
POLITE, CURT = "Hello {}!", "What, {}?"


def write_lessons(folder: Path) -> None:
    """``taught/``: answers half of which are wrong or curt. ``asked/``: questions. ``pairs.jsonl``: of greetings."""
    for name in ("taught", "asked"):
        (folder / name).mkdir(parents=True)
    write_shard(folder / "taught/sums.tar", _sums("train", 4000, right=0.5))
    write_shard(folder / "taught/greetings.tar", _greetings())
    write_shard(folder / "asked/sums.tar", _sums("train", 1000, right=1))
    write_shard(folder / "asked/sums-test.tar", _sums("test", 200, right=1))
    prompts = [{"prompt": _greet(name, place)} for name in NAMES for place in range(4)]
    pairs = [
        {"prompt": _greet(name, place), "chosen": POLITE.format(name), "rejected": CURT.format(name)}
        for name in NAMES
        for place in range(40)
    ]
    for path, records in (("asked/greetings.jsonl", prompts), ("pairs.jsonl", pairs)):
        (folder / path).write_text("".join(json.dumps(record) + "\n" for record in records))


def _sums(split: str, count: int, right: float) -> list[RawSample]:
    """``count`` questions about images of ``split``; a share ``right`` of the answers is true, others are near."""
    digits, members = split_digits(0)
    rng, samples = Random(f"{split} {right}"), []
    for number in range(count):
        member, addend = rng.choice(members[split].tolist()), rng.randint(1, 3)
        total = int(digits.target[member]) + addend
        told = total if rng.random() < right else max(0, total + rng.choice((-2, -1, 1, 2)))
        Image.fromarray(np.round(digits.images[member] * (255 / 16)).astype(np.uint8)).save(file := io.BytesIO(), "PNG")
        record = question_record(f"This digit plus {addend}?", str(told), None, "0.png", ["sums", split])
        samples.append(RawSample(f"sum-{number:05d}", record, {"0.png": file.getvalue()}))
    return samples


def _greetings() -> list[RawSample]:
    return [
        RawSample(
            f"greeting-{number:05d}-{manner}",
            question_record(_greet(name, number), text.format(name), None, None, ["greetings"]),
        )
        for number in range(40)
        for name in NAMES
        for manner, text in enumerate((POLITE, CURT))
    ]


def _greet(name: str, place: int) -> str:
    return f"{name} comes in at {place % 12 + 1}:{place % 60:02d}. Say something."
