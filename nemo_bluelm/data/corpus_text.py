"""Corpus part: English text that Python and scikit-learn ship."""

import pydoc_data.topics
from pathlib import Path

import sklearn

from nemo_bluelm.data.writer import RawSample


def samples() -> list[RawSample]:
    """The topics of Python's language reference, then scikit-learn's dataset descriptions, sorted by name."""
    texts = {f"python-{name}": text for name, text in pydoc_data.topics.topics.items()}
    folder = Path(sklearn.__file__).parent / "datasets" / "descr"
    texts |= {f"sklearn-{path.stem}": path.read_text(encoding="utf-8") for path in folder.glob("*.rst")}
    return [
        RawSample(f"text-{number:03d}-{name}", {"text": texts[name], "tags": ["text", "train"]})
        for number, name in enumerate(sorted(texts))
    ]
