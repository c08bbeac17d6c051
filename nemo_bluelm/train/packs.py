"""The packs of a recipe's data, its tokenizer checked against the model."""

from pathlib import Path

from nemo_bluelm.config.checks import alignment
from nemo_bluelm.config.schema import Recipe, geometry_of
from nemo_bluelm.data import open as data
from nemo_bluelm.data.loader import PackLoader
from nemo_bluelm.data.progress import Lines
from nemo_bluelm.data.teacher_logits import TeacherLogits
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.environment import Launch


def open_packs(recipe: Recipe) -> PackLoader:
    """
    Raises:
        UserError: as ``nemo_bluelm.data.open.open_data``; a tokenizer with more tokens than the model has rows; stored
            logits of something else.
    """
    progress = Lines() if Launch.from_environment().rank == 0 else None
    loader = data.open_data(recipe.data, geometry_of(recipe.model), recipe.seed, alignment(recipe), progress)
    check_vocabulary(recipe, loader.tokenizer)
    distill, rows = recipe.distill, recipe.model.language.vocab_size
    if distill.logits is not None:
        at_one = distill.temperature == 1 and distill.temperature_end in (None, 1)
        most = distill.top_k and max(distill.top_k, distill.top_k_end or 1)
        loader.teacher = TeacherLogits(Path(distill.logits), loader, most, rows, at_one)
    return loader


def check_vocabulary(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """
    Raises:
        UserError: the tokenizer has more tokens than the model has rows.
    """
    rows = recipe.model.language.vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"model.language.vocab_size is {rows}, but the tokenizer in data.root has {tokenizer.vocab_size} "
            "tokens; raise model.language.vocab_size or choose another tokenizer"
        )
