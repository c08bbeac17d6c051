"""``nemo-bluelm ablate``: train the variants of an ablation, measure each, write a table and a plot."""

import argparse
from pathlib import Path

from nemo_bluelm.cli.arguments import positive
from nemo_bluelm.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="a packaged ablation (text_ratio), or an ablation file of your own"
    )
    parser.add_argument(
        "overrides",
        metavar="[STAGE.]key=value",
        nargs="*",
        help="change a value of one stage or variant (yarn.train.steps=50) or of all (seed=5)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for runs, table and plot (outputs/ablations/NAME)"
    )
    parser.add_argument("--nproc", type=positive, default=1, metavar="N", help="processes of each run (1)")


def run(args: argparse.Namespace) -> int:
    """Run the ablation and return the exit code.

    Raises:
        UserError: no name; a mistake in the ablation, its recipes or its data.
    """
    if args.name is None:
        from nemo_bluelm.resources import packaged_recipes

        names = [name.removeprefix("ablations/") for name in packaged_recipes("ablation")]
        raise UserError(f"which ablation? There are {', '.join(names)}; a file of your own may be named too")
    from nemo_bluelm.config.ablation import load_ablation
    from nemo_bluelm.report.ablation import run_ablation

    return run_ablation(load_ablation(args.name, args.overrides, args.out), args.nproc)
