"""A recipe's data, opened for commands that look at it and train nothing."""

from typing import TYPE_CHECKING

from nemo_bluelm.data.progress import Lines
from nemo_bluelm.errors import UserError

if TYPE_CHECKING:
    from nemo_bluelm.data.loader import PackLoader


def open_recipe_data(path: str, overrides: list[str], pixels: bool) -> "PackLoader":
    """The loader of a recipe, its plan at the first pack; packs are the ones that training reads.

    Args:
        pixels: whether images will be decoded; without, the recipe's decode backend need not be installed.

    Raises:
        UserError: the recipe can't train, lacks a key of its data, or the data can't be opened.
    """
    from nemo_bluelm.config.checks import alignment, check_recipe
    from nemo_bluelm.config.compose import load_without_data
    from nemo_bluelm.config.schema import DecodeConfig, geometry_of

    recipe, missing, _ = load_without_data(path, overrides)
    if missing := [key for key in missing if key.startswith("data.")]:
        raise UserError(f"{path}: {', '.join(missing)} not set; set it in the recipe or as {missing[0]}=...")
    check_recipe(recipe, None)
    if not pixels:
        recipe.data.decode = DecodeConfig()

    from nemo_bluelm.data.open import open_data

    return open_data(recipe.data, geometry_of(recipe.model), recipe.seed, alignment(recipe), Lines())
