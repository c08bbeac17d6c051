"""Corpus part: English text that Python and scikit-learn ship."""

import pydoc_data.topics
from pathlib import Path

import sklearn

from nemo_bluelm.data.writer import RawSample

HELD_OUT = 12  # every so many-th text


def samples() -> tuple[list[RawSample], list[RawSample]]:
    """(train, test): the topics of Python's language reference, then scikit-learn's dataset descriptions, by name.

    Every ``HELD_OUT``-th text is for testing.
    """
    texts = {f"python-{name}": text for name, text in pydoc_data.topics.topics.items()}
    folder = Path(sklearn.__file__).parent / "datasets" / "descr"
    texts |= {f"sklearn-{path.stem}": path.read_text(encoding="utf-8") for path in folder.glob("*.rst")}
    made: dict[str, list[RawSample]] = {"train": [], "test": []}
    for number, name in enumerate(sorted(texts)):
        split = "test" if number % HELD_OUT == HELD_OUT - 1 else "train"
        made[split].append(RawSample(f"text-{number:03d}-{name}", {"text": texts[name], "tags": ["text", split]}))
    return made["train"], made["test"]
