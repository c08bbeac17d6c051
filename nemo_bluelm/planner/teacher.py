"""The teacher that runs beside a distilled model, as a recipe of which nothing is trained."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Optional

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.layout import problems
from nemo_bluelm.config.schema import LoraConfig, Part, Recipe, RecomputeConfig
from nemo_bluelm.runtime.run_dir import RECIPE_FILE
from nemo_bluelm.train.teachers import teacher_recipe


def distills(recipe: Recipe) -> bool:
    """Whether its loss has a divergence, from a teacher beside it or from stored logits."""
    return recipe.distill.teacher is not None or recipe.distill.logits is not None


def teacher_beside(recipe: Recipe) -> Optional[Recipe]:
    """The teacher's model in the layout that it has beside the student, all parts frozen.

    None without ``distill.teacher``, or where that names no run yet: a run's shape is read from its recipe, none is
    assumed.

    Raises:
        UserError: the recipe beside the teacher's weights can't be read.
    """
    teacher = recipe.distill.teacher and _read(recipe.distill.teacher)
    if not teacher:
        return None
    alone = replace(recipe.train, freeze=list(Part), recompute=RecomputeConfig(), lora=LoraConfig(), cuda_graphs=False)
    return replace(teacher_recipe(recipe, teacher), train=alone)


def teacher_problems(recipe: Recipe) -> Iterator[str]:
    """Why the teacher can't be laid out beside a student of this layout."""
    beside = teacher_beside(recipe)
    return problems(beside, None) if beside else iter(())


@cache
def _read(run: str) -> Optional[Recipe]:
    """The recipe of a run or checkpoint folder, if there is one; once, since every layout that is looked at asks."""
    file = Path(run) / RECIPE_FILE
    return load_recipe(str(file), []) if file.is_file() else None
