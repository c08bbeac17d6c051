"""``nemo-bluelm bench``: measurements beside what users know."""

import argparse

from nemo_bluelm.cli.group import add_commands

COMMANDS = {"loader": "time the decode backends beside transformers' LLaVA-NeXT processors, or on a GPU"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_commands(parser, "bench", COMMANDS)


def run(args: argparse.Namespace) -> int:
    return args.run(args)
