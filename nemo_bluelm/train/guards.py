"""Mistakes in a recipe that show only in what the trained model does."""

from typing import Optional

from nemo_bluelm.config.schema import ControlToken, Part, Recipe
from nemo_bluelm.errors import UserError

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


def control_token_notice(recipe: Recipe) -> Optional[str]:
    """A warning in one line where the control token doesn't follow the query, as the paper has it; else None."""
    if recipe.data.chat.control_token == ControlToken.after_query:
        return None
    return (
        f"data.chat.control_token is {recipe.data.chat.control_token.value}: BlueLM-2.5 is asked to think behind the "
        "query, and prompts elsewhere have the token there; set after_query unless you compare"
    )
