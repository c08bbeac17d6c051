"""``nemo-bluelm import``: a checkpoint out of a Hugging Face model's folder."""

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", metavar="hf", choices=["hf"], help="what is imported: a Hugging Face folder")
    parser.add_argument("source", metavar="DIR", type=Path, help="folder of a SigLIP, Llama, Qwen3 or our own export")
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="checkpoint folder to make, for init_from")
    parser.add_argument("--recipe", metavar="RECIPE", help="what the checkpoint carries beside the shapes in DIR")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change a value of the recipe")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def run(args: argparse.Namespace) -> int:
    """Import and return the exit code.

    Raises:
        UserError: a mistake in the arguments or in DIR.
    """
    from nemo_bluelm.convert.importing import import_hf

    done = import_hf(args.source, args.checkpoint, args.recipe, tuple(args.overrides))
    if args.json:
        print(
            json.dumps(
                {
                    "checkpoint": str(args.checkpoint),
                    "tensors": {part.value: count for part, count in done.tensors.items()},
                    "skipped": done.skipped,
                    "replaced": done.replaced,
                    "vocabulary": done.vocabulary,
                }
            )
        )
        return 0
    parts = ", ".join(f"{part.value} ({count} tensors)" for part, count in done.tensors.items())
    print(f"{args.checkpoint} holds {parts} of {args.source}")
    for reason, count in done.skipped.items():
        print(f"skipped: {count} tensors, {reason}")
    if done.vocabulary and done.vocabulary[0] != done.vocabulary[1]:
        there, here = done.vocabulary
        print(f"vocabulary: {there} rows there, {here} here; each new row is the mean of the others")
    for key, (recipe, folder) in done.replaced.items():
        print(f"{key} is {folder}; {args.recipe} has {recipe}", file=sys.stderr)
    return 0
