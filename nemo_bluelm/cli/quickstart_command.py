"""``nemo-bluelm quickstart``: every stage, tiny, on this machine."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("outputs/quickstart"),
        metavar="DIR",
        help="folder for corpus, runs and report (outputs/quickstart)",
    )
    parser.add_argument(
        "overrides",
        metavar="[STAGE.]key=value",
        nargs="*",
        help="change a value of one stage (sft.train.steps=50) or of all (seed=5)",
    )


def run(args: argparse.Namespace) -> int:
    from nemo_bluelm.quickstart import run as quickstart

    return quickstart(args.out, args.overrides)
