"""``nemo-bluelm merge``: a LoRA run's checkpoint without adapters."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder, or one of its checkpoints")
    parser.add_argument("out", metavar="OUT", type=Path, help="checkpoint folder to make, for init_from")


def run(args: argparse.Namespace) -> int:
    """Merge and return the exit code.

    Raises:
        UserError: a mistake in the arguments.
    """
    from nemo_bluelm.train.merging import merge

    print(f"{args.out} holds the merged weights of {merge(args.checkpoint, args.out)}")
    return 0
