"""A small corpus of real images and text as WebDataset shards, made from what Python packages ship. No downloads.

Sources: scikit-learn's handwritten digits, sample photos and dataset descriptions; scikit-image's photos; the language
reference inside Python (``pydoc_data.topics``).
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nemo_bluelm.data.tokenizer import Tokenizer, train_tokenizer
from nemo_bluelm.data.writer import write_shard, write_split
from nemo_bluelm.errors import UserError


def make_corpus(out: Path, vocab_size: int = 2048, seed: int = 0) -> dict:
    """Write the corpus into the new folder ``out``: it is there whole or not at all, and the same every time.

    - ``digits-train-*.tar``, ``digits-test.tar``: 8 x 8 pixel digits; 20 % of each class are held out, from tokenizer
      training too. Every training image is there twice, with and without a thought.
    - ``photos-train-*.tar``: views of 26 photos, of one to 17 tiles at 56 pixels a tile.
    - ``text-train-*.tar``: plain text.
    - ``tokenizer.json``: trained on the training shards.

    Returns:
        Samples by split, plus the tokenizer's ``vocab_size``.

    Raises:
        UserError: ``out`` exists and isn't an empty folder, or can't be written; a package that ships data is missing.
    """
    try:
        from nemo_bluelm.data import corpus_digits, corpus_photos, corpus_text
    except ImportError as error:
        raise UserError(f"the corpus needs {error.name}; pip install scikit-learn scikit-image") from error

    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; remove it or choose another")
    digits_train, digits_test = corpus_digits.samples(seed)
    photos, text = corpus_photos.samples(seed), corpus_text.samples()
    texts = (t for split in (digits_train, photos, text) for sample in split for t in sample.texts())
    partial: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        write_split(partial, "digits-train", digits_train, shards=4)
        write_shard(partial / "digits-test.tar", digits_test)
        write_split(partial, "photos-train", photos, shards=2)
        write_split(partial, "text-train", text, shards=2)
        train_tokenizer(texts, vocab_size, partial / "tokenizer.json")
        vocabulary = Tokenizer.load(partial / "tokenizer.json").vocab_size
        partial.chmod(0o755)  # mkdtemp makes private folders
        os.rename(partial, out)
    except OSError as error:
        raise UserError(f"the corpus can't be written to {out}: {error.strerror}; choose another folder") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return {
        "digits-train": len(digits_train),
        "digits-test": len(digits_test),
        "photos-train": len(photos),
        "text-train": len(text),
        "vocab_size": vocabulary,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of tools/make_corpus.py; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make_corpus", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--vocab-size", type=int, default=2048, help="vocabulary of the tokenizer (default 2048)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        print(json.dumps(make_corpus(arguments.out, arguments.vocab_size, arguments.seed)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
