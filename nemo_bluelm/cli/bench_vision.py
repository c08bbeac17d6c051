"""``nemo-bluelm bench vision``: ViT and projector beside transformers' SigLIP."""

import argparse

from nemo_bluelm.cli.arguments import positive
from nemo_bluelm.cli.bench_options import add_json_file, check_files, natural, print_rows, save


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change a value or a block, as for train")
    parser.add_argument("--recipe", default="bench/mixed", metavar="RECIPE", help="whose ViT (bench/mixed)")
    parser.add_argument("--tiles", type=positive, default=64, metavar="N", help="in a batch (64)")
    parser.add_argument("--steps", type=positive, default=15, metavar="N", help="steps that count (15)")
    parser.add_argument("--warmup", type=natural, default=5, metavar="N", help="steps before them (5)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile SigLIP's layers (yes)"
    )
    add_json_file(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table and the ratio to the faster SigLIP, and write what ``--json`` asks for.

    Raises:
        UserError: a mistake in the recipe, or a file that can't be written.
    """
    from nemo_bluelm.config.checks import check_machine, check_recipe
    from nemo_bluelm.config.compose import load_recipe
    from nemo_bluelm.runtime.environment import prepare

    check_files(args, "json")
    recipe = load_recipe(args.recipe, args.overrides)
    check_recipe(recipe, world_size=1)
    check_machine(recipe)
    prepare()
    from nemo_bluelm.bench.machine import training_environment
    from nemo_bluelm.bench.vision import measure_vision

    rows = measure_vision(recipe, args.tiles, args.steps, args.warmup, args.compile)
    measured = [row for row in rows[1:] if "error" not in row]
    best = max(measured, key=lambda row: row["tiles_per_second"], default=None)
    ratio = None
    if best and "error" not in rows[0]:
        ratio = round(rows[0]["tiles_per_second"] / best["tiles_per_second"], 4)
    report = {"bench": "vision", "recipe": args.recipe, "overrides": args.overrides, "rows": rows}
    save(args, {**report, "best": best and best["name"], "ratio": ratio, "environment": training_environment()})
    print_rows(f"ViT and projector, forward and backward {' '.join(args.overrides)}".strip(), rows, unit="tiles")
    if ratio:
        print(f"{ratio:.3f} times the tiles a second of {best['name']}")
    return 1 if ratio is None else 0
