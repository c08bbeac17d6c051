"""Arguments that several commands share."""

import argparse


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """``RECIPE [key=value ...]``."""
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a packaged recipe (tiny/sft)")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="change a value (optim.lr=1e-4) or a block (model=tiny); Hydra's override grammar",
    )


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def positive(text: str) -> int:
    """argparse type: a whole number of 1 or more."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """argparse type: a whole number of 0 or more."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
    return value
