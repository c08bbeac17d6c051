"""An exporter: the tokens that a checkpoint knows, one a line."""

import json
from pathlib import Path


def words(checkpoint: Path, folder: Path) -> None:
    """Write ``folder``/words.txt.

    Args:
        checkpoint: a checkpoint folder; its files are those that the architecture page lists.
    """
    vocabulary = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    folder.mkdir(parents=True)
    (folder / "words.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n")
