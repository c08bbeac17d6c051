"""Whether a checkpoint can teach a run, told before anything heavy is imported."""

from dataclasses import replace

from nemo_bluelm.config.checks import check_recipe
from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.layout import problems
from nemo_bluelm.config.schema import DistillConfig, Recipe
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE, resolve_checkpoint

# The same ids must mean the same tokens, and an image must take the same rows.
_EQUAL = ("language.vocab_size", "geometry.tile", "geometry.patch", "geometry.merge")


def check_teacher(recipe: Recipe, tokenizer: bytes) -> None:
    """Refuse a teacher of other tokens, of fewer positions, or of a shape that the student's layout can't split.

    Args:
        recipe: the student's, with ``distill.teacher``.
        tokenizer: content of the run's tokenizer file.

    Raises:
        UserError: naming the key and both values.
    """
    name = f"distill.teacher {recipe.distill.teacher}"
    checkpoint = resolve_checkpoint(recipe.distill.teacher, "distill.teacher")
    teacher = load_recipe(str(checkpoint / RECIPE_FILE), [])
    if teacher.train.lora.rank:
        raise UserError(
            f"{name} has LoRA adapters, which its weights don't have yet; take them in with 'nemo-bluelm merge' and "
            "name the result"
        )
    for key in _EQUAL:
        part, _, field = key.partition(".")
        mine, its = (getattr(getattr(model, part), field) for model in (recipe.model, teacher.model))
        if mine != its:
            raise UserError(f"model.{key} is {mine}, but {name} was trained with {its}; make them equal")
    if tokenizer != (checkpoint / TOKENIZER_FILE).read_bytes():
        raise UserError(
            f"data.tokenizer {recipe.data.tokenizer} in data.root is not the tokenizer that {name} was trained with; "
            f"use {checkpoint / TOKENIZER_FILE}"
        )
    beside = teacher_recipe(recipe, teacher)
    try:
        check_recipe(replace(beside, parallel=type(beside.parallel)()), None)
    except UserError as error:
        raise UserError(f"{name} can't read the run's packs: {error}") from error
    if problem := next(problems(beside, None), None):
        way_out = "set distill.split_teacher=false" if recipe.distill.split_teacher else "choose another layout"
        raise UserError(f"{name} can't be laid out as the student is: {problem}; {way_out}")


def teacher_recipe(recipe: Recipe, teacher: Recipe) -> Recipe:
    """The student's recipe with the teacher's model and dtype in the teacher's layout.

    Args:
        recipe: the student's.
        teacher: the recipe beside the teacher's weights.
    """
    parallel = recipe.parallel
    if not recipe.distill.split_teacher:
        parallel = replace(parallel, tensor=1, sequence=False)
    precision = replace(recipe.precision, dtype=teacher.precision.dtype, fp8=type(recipe.precision.fp8)())
    return replace(recipe, model=teacher.model, parallel=parallel, precision=precision, distill=DistillConfig())
