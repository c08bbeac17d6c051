"""``nemo-bluelm data``: the commands for shards, indexes, mixtures and images."""

import argparse

from nemo_bluelm.cli.group import add_commands

COMMANDS = {
    "index": "index shards: place, size, tokens and tiles of every sample",
    "stats": "show a recipe's mixture: tokens, images, tiles, and how full its packs are",
    "inspect": "write one pack of a recipe as an HTML page: tokens, targets, tiles in place",
    "view": "draw how an image is cut into tiles",
    "quarantine": "list the bad samples of an index, or leave them out from now on",
    "curate": "filter, deduplicate and tag shards before training",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_commands(parser, "data", COMMANDS)


def run(args: argparse.Namespace) -> int:
    return args.run(args)
