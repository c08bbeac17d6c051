"""A small corpus of real images and text and of synthetic problems, as WebDataset shards. No downloads.

Sources of what is real: scikit-learn's handwritten digits, sample photos and dataset descriptions; scikit-image's
photos; the language reference inside Python (``pydoc_data.topics``).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from random import Random

from nemo_bluelm.atomic import new_folder
from nemo_bluelm.data.corpus_preferences import write_preferences
from nemo_bluelm.data.needle import Haystack, needle_samples, sample_texts
from nemo_bluelm.data.reasoning import MODES, Problem, prompt_samples, reasoning_samples, text_problem
from nemo_bluelm.data.tokenizer import Tokenizer, train_tokenizer
from nemo_bluelm.data.writer import RawSample, write_shard, write_split
from nemo_bluelm.errors import UserError

SHORT, LONG = 512, 4096  # tokens of the longest documents before and in the long-context stage
_SHARDS = {"digits": 4, "photos": 2, "text": 2, "reasoning": 2}  # others have one


def make_corpus(out: Path, vocab_size: int = 2048, seed: int = 0) -> dict:
    """Write the corpus into the new folder ``out``: it is there whole or not at all, and the same every time.

    - ``digits-train-*.tar``, ``digits-test.tar``: 8 x 8 pixel digits; 20 % of each class are held out, from tokenizer
      training too. Every training image is there twice, with and without a thought.
    - ``photos-train-*.tar``: views of 26 photos, of one to 17 tiles at 56 pixels a tile; every other with a thought.
    - ``text-train-*.tar``, ``text-test.tar``: plain text.
    - ``reasoning-train-*.tar``, ``reasoning-test.tar``: synthetic problems with thoughts, in text and about grids of
      digits.
    - ``sft-train-*.tar``: other such problems in text, each without a thought, with it, and with it cut short.
    - ``prompts-train-*.tar``: such problems without a reply, with their ``answer`` and ``difficulty``.
    - ``recall-train-*.tar``, ``needle-train-*.tar``, ``long-train-*.tar``: documents of few, of up to ``SHORT`` and of
      up to ``LONG`` tokens with a question about a number that they tell.
    - ``preferences/*.tar``: pairs of answers to questions about digits and in text, for training and for test.
    - ``tokenizer.json``: trained on the training shards.

    Returns:
        Samples by split, plus the tokenizer's ``vocab_size``.

    Raises:
        UserError: ``out`` exists and isn't an empty folder, or can't be written; a package that ships data is missing.
    """
    with new_folder(Path(out)) as partial:
        train, test = _samples(seed)
        texts = chain((t for split in train.values() for sample in split for t in sample.texts()), sample_texts())
        train_tokenizer(texts, vocab_size, partial / "tokenizer.json")
        tokenizer = Tokenizer.load(partial / "tokenizer.json")
        train |= _needles(train["text"], tokenizer, seed)
        held_out = {text for samples in test.values() for sample in samples for text in sample.texts()}
        prompts = prompt_samples(_problem, 2000, f"prompt-{seed}")
        train["prompts"] = [prompt for prompt in prompts if prompt.texts()[0] not in held_out]
        for name, samples in train.items():
            write_split(partial, f"{name}-train", samples, _SHARDS.get(name, 1))
        for name, samples in test.items():
            write_shard(partial / f"{name}-test.tar", samples)
        pairs = write_preferences(partial, partial / "preferences", seed)
    counts = {f"{name}-train": len(samples) for name, samples in train.items()}
    counts |= {f"{name}-test": len(samples) for name, samples in test.items()}
    counts |= {f"preferences/{name}": count for name, count in pairs.items()}
    return {**counts, "vocab_size": tokenizer.vocab_size}


def _samples(seed: int) -> tuple[dict[str, list[RawSample]], dict[str, list[RawSample]]]:
    """Training and test samples by kind, all but those with needles."""
    try:
        from nemo_bluelm.data import corpus_digits, corpus_photos, corpus_text
        from nemo_bluelm.data.reasoning_images import image_problems
    except ImportError as error:
        raise UserError(f"the corpus needs {error.name}; pip install scikit-learn scikit-image") from error

    digits_train, digits_test = corpus_digits.samples(seed)
    text_train, text_test = corpus_text.samples()
    train = {
        "digits": digits_train,
        "photos": corpus_photos.samples(seed),
        "text": text_train,
        "reasoning": [
            *reasoning_samples(_problem, 5000, ("think",), f"train-{seed}", ("reasoning", "train")),
            *reasoning_samples(image_problems(seed, "train"), 800, ("think",), f"grid-{seed}", ("reasoning", "train")),
        ],
        "sft": list(reasoning_samples(_problem, 2000, MODES, f"sft-{seed}", ("sft", "train"))),
    }
    # Problems that were trained on are left out of the test; problems about images have images of their own.
    asked = {text for name in ("reasoning", "sft") for sample in train[name] for text in sample.texts()}
    held_out = reasoning_samples(_problem, 300, ("think",), f"test-{seed}", ("reasoning", "test"))
    test = {
        "digits": digits_test,
        "text": text_test,
        "reasoning": [
            *(sample for sample in held_out if sample.texts()[0] not in asked),
            *reasoning_samples(image_problems(seed, "test"), 100, ("think",), f"grid-{seed}", ("reasoning", "test")),
        ],
    }
    return train, test


def _problem(rng: Random) -> Problem:
    """What two layers can learn in minutes: calculations with one digit, each step of which comes often enough."""
    return text_problem(rng, largest=9)


def _needles(texts: Sequence[RawSample], tokenizer: Tokenizer, seed: int) -> dict[str, list[RawSample]]:
    """Documents with needles: ``needle`` as short as the other training data, ``long`` beyond."""
    haystack = Haystack([text for sample in texts for text in sample.texts()], lambda text: len(tokenizer.encode(text)))
    recall = [(48, 48, 64, 96)[number % 4] for number in range(480)]
    short = [(64, 128, 224, 320, SHORT - 96)[number % 5] for number in range(1200)]
    long = [LONG >> (number % 3) for number in range(48)]  # 4096, 2048, 1024, ...
    # The question comes six times: of a document hardly any token is a target.
    return {
        "recall": needle_samples(haystack, recall, f"recall-{seed}", ("needle", "train"), turns=6),
        "needle": needle_samples(haystack, short, f"needle-{seed}", ("needle", "train"), turns=6),
        "long": needle_samples(haystack, long, f"long-{seed}", ("long", "train")),
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
