"""Mistakes in a recipe that show only in what the trained model does."""

from dataclasses import asdict
from typing import Optional

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import ControlToken, Part, Recipe
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, Origin

# BlueLM-2.5 trains jointly on 40 % text so that text isn't forgotten: fine-tuned on images, BlueLM-3B fell from 60.2
# to 43.8 in its text benchmarks (GenieBlue, Table 3). How little would do is not known; proposed: 5 points below.
LEAST_TEXT_SHARE = 0.35


def text_share_notice(recipe: Recipe, share: float) -> Optional[str]:
    """A warning in one line where a trained language model sees too little plain text; None where it sees enough.

    Args:
        recipe: a checked one.
        share: of text without images in the mixture's tokens, from 0 to 1.

    Raises:
        UserError: the share is below ``train.min_text_share``.
    """
    least = recipe.train.min_text_share
    if share >= (LEAST_TEXT_SHARE if least is None else least) - 1e-9:  # a sum of weights
        return None
    found = f"{share:.1%} of the mixture's tokens are of samples without images"
    if least is not None:
        raise UserError(
            f"train.min_text_share is {least}, but {found}; raise the weights of text in data.sources, or lower it"
        )
    if Part.language in recipe.train.freeze:
        return None
    return (
        f"{found}, less than {LEAST_TEXT_SHARE:.0%}: the language model may forget what it knows of text; raise the "
        "weights of text in data.sources, or set train.min_text_share to the share that you want"
    )


def positions_notice(recipe: Recipe, origin: Origin) -> Optional[str]:
    """A warning in one line where the model is to turn its positions otherwise than its origin learnt to; else None.

    YaRN after plain RoPE is how a context is made longer, and needs no warning.
    """
    if Part.language not in origin.parts:
        return None
    mine, its = recipe.model.language, load_recipe(str(origin.checkpoint / RECIPE_FILE), []).model.language
    pairs = {"rotary_base": (mine.rotary_base, its.rotary_base)}
    if its.yarn.factor > 1:
        before = asdict(its.yarn)
        pairs |= {f"yarn.{name}": (value, before[name]) for name, value in asdict(mine.yarn).items()}
    for name, (now, then) in pairs.items():
        if now != then:
            return (
                f"model.language.{name} is {now}, and {origin.key} {origin.checkpoint} was trained with {then}: to its "
                f"weights positions mean something else; set model.language.{name}={then} unless you mean that"
            )
    return None


def control_token_notice(recipe: Recipe) -> Optional[str]:
    """A warning in one line where the control token doesn't follow the query, as the paper has it; else None."""
    if recipe.data.chat.control_token == ControlToken.after_query:
        return None
    return (
        f"data.chat.control_token is {recipe.data.chat.control_token.value}: BlueLM-2.5 is asked to think behind the "
        "query, and prompts elsewhere have the token there; set after_query unless you compare"
    )
