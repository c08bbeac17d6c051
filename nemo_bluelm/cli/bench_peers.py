"""``nemo-bluelm bench peers``: a recipe's training beside the same model in Hugging Face transformers."""

import argparse
import sys
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
from nemo_bluelm.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    add_measure_arguments(parser)
    parser.add_argument(
        "--micro-batches", type=_sizes, metavar="A,B", help="packs in a forward pass to try (1,2,4,... while they fit)"
    )
    parser.add_argument("--ours", action=argparse.BooleanOptionalAction, default=True, help="measure ours too (yes)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="torch.compile each layer of the peer (yes)",
    )
    parser.add_argument("--profile", metavar="FILE", help="write each peer case's longest kernels to FILE_CASE")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)  # this process measures; FILE gets JSON


def run(args: argparse.Namespace) -> int:
    """Measure, print a table and the ratio to the peer's best, and write what ``--json`` asks for.

    Raises:
        UserError: a mistake in the recipe, its data, or a file that can't be written.
    """
    from nemo_bluelm.bench.hf_run import compare, measure, measure_here
    from nemo_bluelm.bench.train import measure as measure_ours
    from nemo_bluelm.cli.bench_children import start

    profile = Path(args.profile) if args.profile else None
    if args.worker:
        return measure_here(
            args.recipe, args.steps, args.warmup, args.micro_batches, args.compile, Path(args.worker), profile
        )
    refuse_ranks()
    check_files(args, "json", "profile")
    recipe = bench_recipe(args, world_size=1)
    _check_sizes(args.micro_batches or [], recipe.train.global_batch_size)
    ours = measure_ours(recipe, args.steps, args.warmup, start) if args.ours else None
    rows = measure(recipe, args.steps, args.warmup, start, args.micro_batches, args.compile, profile)
    report = {"bench": "peers", "recipe": args.recipe, "overrides": args.overrides, **compare(ours, rows)}
    save(args, report)
    print_rows(f"{args.recipe} {' '.join(args.overrides)}".strip(), [*([ours] if ours else []), *rows])
    if report["ratio"]:
        print(f"{report['ratio']:.3f} times the tokens a second of {report['best']}")
    if report["note"]:
        print(f"note: {report['note']}", file=sys.stderr)
    return 1 if report["best"] is None or (args.ours and report["ratio"] is None) else 0


def _check_sizes(micro_batches: list[int], packs: int) -> None:
    for size in micro_batches:
        if packs % size:
            raise UserError(
                f"--micro-batches {size} does not divide train.global_batch_size {packs}; take one of "
                + ", ".join(str(n) for n in range(1, packs + 1) if packs % n == 0)
            )


def _sizes(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]
