"""``nemo-bluelm data curate``: filter, dedup and tag records by a curation recipe."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a curation recipe, or a packaged one's name (curate/text)")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change a value: output=outputs/clean")
    parser.add_argument("--dry-run", action="store_true", help="show the stages and Slurm's scripts, run nothing")


def run(args: argparse.Namespace) -> int:
    """Curate, and print the report.

    Raises:
        UserError: the recipe is wrong, the extra ``curate`` isn't installed, the input can't be read.
    """
    from nemo_bluelm.data.curate.run import dry_run
    from nemo_bluelm.data.curate.run import run as run_recipe
    from nemo_bluelm.data.curate.schema import load_recipe
    from nemo_bluelm.resources import find_recipe

    recipe = load_recipe(find_recipe(args.recipe, "curate"), args.overrides)
    report = dry_run(recipe) if args.dry_run else run_recipe(recipe)
    if report is not None:
        print(report)
    return 0
