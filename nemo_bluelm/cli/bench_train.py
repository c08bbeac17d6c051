"""``nemo-bluelm bench train``: how fast a recipe trains here."""

import argparse
import sys
from functools import partial
from pathlib import Path

from nemo_bluelm.cli.arguments import add_recipe_arguments, positive
from nemo_bluelm.cli.bench_options import (
    add_measure_arguments,
    bench_recipe,
    check_files,
    print_rows,
    refuse_ranks,
    save,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_measure_arguments(parser)
    parser.add_argument("--nproc", type=positive, default=1, metavar="N", help="processes, one per GPU (1)")
    parser.add_argument("--profile", metavar="FILE", help="write the longest kernels of one more step to FILE")
    parser.add_argument(
        "--save-every", type=positive, metavar="N", help="make checkpoints, and say how long they hold training up"
    )
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)  # this process is a rank; FILE gets JSON


def run(args: argparse.Namespace) -> int:
    """Measure, print a line, and write what ``--json`` asks for.

    Raises:
        UserError: a mistake in the recipe, its data, or a file that can't be written.
    """
    from nemo_bluelm.bench.train import measure, measure_here
    from nemo_bluelm.cli.bench_children import start

    profile = Path(args.profile) if args.profile else None
    if args.worker:
        return measure_here(args.recipe, args.steps, args.warmup, Path(args.worker), profile, args.save_every)
    refuse_ranks()
    check_files(args, "json", "profile")
    recipe = bench_recipe(args, args.nproc)
    row = measure(recipe, args.steps, args.warmup, partial(start, nproc=args.nproc), profile, args.save_every)
    row = {"recipe": args.recipe, "overrides": args.overrides, **row}
    save(args, {"bench": "train", **row})
    print_rows(f"{args.recipe} {' '.join(args.overrides)}".strip(), [row])
    if row.get("checkpoints", {}).get("stalls"):
        saved = row["checkpoints"]
        seconds = ", ".join(f"{stall:.3f}" for stall in saved["stalls"])
        print(f"checkpoints held training up for {seconds} s: {saved['of_a_step']:.1%} of a step", file=sys.stderr)
    return 1 if "error" in row else 0
