"""``nemo-bluelm bench generate``: generation beside transformers' ``generate``."""

import argparse

from nemo_bluelm.cli.arguments import positive
from nemo_bluelm.cli.bench_options import add_json_file, check_files, natural, save
from nemo_bluelm.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change a value or a block, as for train")
    parser.add_argument("--recipe", default="bench/text_4k", metavar="RECIPE", help="whose model (bench/text_4k)")
    parser.add_argument("--prompts", type=positive, default=64, metavar="N", help="in a batch (64)")
    parser.add_argument("--samples", type=positive, default=8, metavar="N", help="replies to each (8)")
    parser.add_argument("--prompt-tokens", type=positive, default=512, metavar="N", help="of each (512)")
    parser.add_argument("--new-tokens", type=positive, default=512, metavar="N", help="of each reply (512)")
    parser.add_argument("--tiles", type=natural, default=0, metavar="N", help="of each prompt, among its tokens (0)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="(1.0)")
    add_json_file(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table and the ratio, and write what ``--json`` asks for.

    Raises:
        UserError: a mistake in the recipe or the load, or a file that can't be written.
    """
    from nemo_bluelm.config.checks import check_machine, check_recipe
    from nemo_bluelm.config.compose import load_recipe
    from nemo_bluelm.config.schema import geometry_of
    from nemo_bluelm.runtime.environment import prepare

    check_files(args, "json")
    recipe = load_recipe(args.recipe, args.overrides)
    check_recipe(recipe, world_size=1)
    check_machine(recipe)
    if not 0 < args.temperature < float("inf"):
        raise UserError(f"--temperature {args.temperature}: it must be greater than 0, so that samples differ")
    visual = args.tiles * geometry_of(recipe.model).tokens_per_tile
    if args.prompt_tokens <= visual:
        raise UserError(
            f"--prompt-tokens {args.prompt_tokens}: {args.tiles} tiles alone have {visual}; ask for more than that"
        )
    prepare()
    from rich.console import Console
    from rich.table import Table

    from nemo_bluelm.bench.generate import Load, measure_generation
    from nemo_bluelm.bench.machine import training_environment

    load = Load(args.prompts, args.samples, args.prompt_tokens, args.new_tokens, args.tiles)
    rows = measure_generation(recipe, load, args.temperature)
    ours, theirs = rows
    ratio = None
    if "error" not in ours and "error" not in theirs:
        ratio = round(ours["tokens_per_second"] / theirs["tokens_per_second"], 4)
    report = {"bench": "generate", "recipe": args.recipe, "overrides": args.overrides, "rows": rows, "ratio": ratio}
    save(args, {**report, "environment": training_environment()})
    table = Table("", "first token, s", "all, s", "tokens/s", "peak GiB", title=f"{vars(load)}")
    for row in rows:
        memory = row.get("memory") or {}
        cells = [
            row.get(name, row.get("error", "")) for name in ("first_token_seconds", "seconds", "tokens_per_second")
        ]
        table.add_row(row["name"], *map(str, cells), str(memory.get("allocated_gib", "")))
    Console().print(table)
    if ratio:
        print(f"{ratio:.2f} times the tokens a second of transformers")
    return 1 if ratio is None else 0
