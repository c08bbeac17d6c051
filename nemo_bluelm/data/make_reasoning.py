"""Shards of synthetic reasoning problems, as many as wanted."""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path

from nemo_bluelm.atomic import new_folder
from nemo_bluelm.data.reasoning import MODES, reasoning_samples, text_problem
from nemo_bluelm.data.reasoning_images import image_problems
from nemo_bluelm.data.writer import write_shard
from nemo_bluelm.errors import UserError

_SHARD = 10_000  # samples in a shard


def make_reasoning(out: Path, text: int, image: int, modes: Sequence[str] = ("think",), seed: int = 0) -> dict:
    """Write ``reasoning-text-*.tar`` and ``reasoning-image-*.tar`` into the new folder ``out``, whole or not at all.

    Args:
        text, image: problems of each sort, no two alike; each is there once in every mode.
        modes: of :data:`nemo_bluelm.data.reasoning.MODES`.

    Returns:
        Samples by sort.

    Raises:
        UserError: the folder exists and isn't empty, or can't be written; an unknown mode, no problem at all.
    """
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise UserError(f"mode is {unknown[0]!r}; it must be one of {', '.join(MODES)}")
    if len({*modes}) < len(modes):
        raise UserError(f"modes are {', '.join(modes)}; name each once")
    if min(text, image) < 0 or text + image == 0 or not modes:
        raise UserError(f"text is {text} and image {image}; both must be 0 or more and one of them greater than 0")
    sorts = {
        "text": reasoning_samples(text_problem, text, modes, f"text-{seed}", ("reasoning",)),
        "image": reasoning_samples(image_problems(seed, "train"), image, modes, f"image-{seed}", ("reasoning",)),
    }
    with new_folder(out) as partial:
        for sort, samples in sorts.items():
            number = 0
            while first := next(samples, None):
                shard = chain([first], islice(samples, _SHARD - 1))
                write_shard(partial / f"reasoning-{sort}-{number:05d}.tar", shard)
                number += 1
    return {"text": text * len(modes), "image": image * len(modes)}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of tools/make_reasoning.py; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make_reasoning", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--text", type=int, default=10_000, help="problems in text (default 10000)")
    parser.add_argument("--image", type=int, default=10_000, help="problems about images (default 10000)")
    parser.add_argument("--modes", nargs="+", default=["think"], metavar="MODE", help=f"of {', '.join(MODES)}")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        print(json.dumps(make_reasoning(**vars(arguments))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
