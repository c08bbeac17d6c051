"""Commands that have commands of their own, such as ``nemo-bluelm data index``."""

import argparse
import importlib


def add_commands(parser: argparse.ArgumentParser, group: str, commands: dict[str, str]) -> None:
    """Add the commands of a group, {name: what --help says}; their modules are ``cli/GROUP_NAME.py``."""
    below = parser.add_subparsers(dest="subcommand", metavar="COMMAND", required=True)
    for name, summary in commands.items():
        sub = below.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        module = importlib.import_module(f"nemo_bluelm.cli.{group}_{name}")
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
