"""``nemo-bluelm train``: check a recipe or a pipeline, then train it here, as one rank, or as several processes."""

import argparse
import os

from nemo_bluelm.cli.arguments import add_recipe_arguments, not_negative, positive
from nemo_bluelm.errors import UserError
from nemo_bluelm.registry import STAGES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument(
        "--nproc", type=positive, default=1, metavar="N", help="processes on this machine, one per GPU or CPU share (1)"
    )
    parser.add_argument(
        "--max-restarts",
        type=not_negative,
        default=0,
        metavar="K",
        help="start the processes again up to K times where one crashed or was killed (0)",
    )


def run(args: argparse.Namespace) -> int:
    """Train and return the exit code.

    Raises:
        UserError: a mistake in the recipe or the launch; found before anything heavy is imported where possible.
    """
    from nemo_bluelm.config.checks import check_machine, check_recipe
    from nemo_bluelm.config.compose import load_recipe
    from nemo_bluelm.config.pipeline import is_pipeline, load_pipeline
    from nemo_bluelm.runtime.environment import Launch

    is_rank = "RANK" in os.environ
    for flag, value, default in (("--nproc", args.nproc, 1), ("--max-restarts", args.max_restarts, 0)):
        if is_rank and value > default:
            raise UserError(
                f"{flag} {value}: this process already is rank {os.environ['RANK']} of a launcher's job; "
                f"leave {flag} out"
            )
    if is_pipeline(args.recipe):
        if is_rank:
            raise UserError(
                f"{args.recipe} is a pipeline, which starts the ranks of its stages itself; start it once, with "
                "--nproc N, or give the launcher the recipe of one stage"
            )
        from nemo_bluelm.train.chain import run_pipeline

        return run_pipeline(load_pipeline(args.recipe, args.overrides), args.nproc, args.max_restarts)
    recipe = load_recipe(args.recipe, args.overrides)
    check_recipe(recipe, world_size=Launch.from_environment().world_size if is_rank else args.nproc)
    check_machine(recipe)
    if args.nproc > 1 or args.max_restarts:
        from nemo_bluelm.cli.local_launch import launch

        return launch(["train", args.recipe, *args.overrides], args.nproc, args.max_restarts)
    from nemo_bluelm.train.run import train

    return train(recipe, STAGES.find(recipe.stage or recipe.objective.value, "stage"))
