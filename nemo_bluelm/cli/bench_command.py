"""``nemo-bluelm bench``: measurements beside what users know."""

import argparse

from nemo_bluelm.cli.group import add_commands

COMMANDS = {
    "train": "time a recipe's training steps, through the real loader",
    "peers": "time a recipe's training beside the same model in Hugging Face transformers",
    "vision": "time ViT and projector beside transformers' SigLIP",
    "generate": "time generation beside transformers' generate",
    "corpus": "make the corpus that train and peers use, to carry it to another machine",
    "loader": "time the decode backends beside transformers' LLaVA-NeXT processors, or on a GPU",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_commands(parser, "bench", COMMANDS)


def run(args: argparse.Namespace) -> int:
    return args.run(args)
