"""``nemo-bluelm prune``: cut a checkpoint's language model to a narrower recipe's shape."""

import argparse
from dataclasses import replace
from pathlib import Path

from nemo_bluelm.cli.arguments import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", metavar="TEACHER", help="run folder, or one of its checkpoints")
    parser.add_argument("out", metavar="OUT", type=Path, help="checkpoint folder to make, for init_from")
    parser.add_argument("--recipe", required=True, metavar="RECIPE", help="the student's: shape and calibration data")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change a value of the recipe")
    parser.add_argument("--packs", type=positive, default=32, metavar="N", help="packs of calibration data (32)")


def run(args: argparse.Namespace) -> int:
    """Prune and return the exit code.

    Raises:
        UserError: a mistake in the arguments, the recipe or its data.
    """
    from nemo_bluelm.config.checks import check_recipe
    from nemo_bluelm.config.compose import NO_CHECKPOINTS, load_recipe
    from nemo_bluelm.config.schema import DistillConfig
    from nemo_bluelm.train.pruning import prune

    # What the student will start and learn from is being made, or isn't needed for it.
    recipe = load_recipe(args.recipe, [*NO_CHECKPOINTS, *args.overrides])
    recipe = replace(recipe, distill=DistillConfig())
    check_recipe(recipe, world_size=None)
    language = recipe.model.language
    made = prune(args.teacher, args.out, recipe, args.packs)
    print(
        f"{args.out} {'holds' if made else 'already holds'} {language.num_layers} layers of hidden size "
        f"{language.hidden_size}, {language.num_attention_heads} heads and {language.ffn_hidden_size} neurons"
    )
    return 0
