"""What the distill keys may say."""

import pytest

from nemo_bluelm.config.checks import check_recipe
from nemo_bluelm.config.compose import load_recipe, load_without_data
from nemo_bluelm.errors import UserError


@pytest.mark.parametrize(
    "keys, message",
    [
        (["weight=0.5"], "distill.weight is 0.5 without a teacher to learn from; set distill.teacher or"),
        (["top_k=8"], "distill.top_k is 8 without a teacher"),
        (["teacher=a", "logits=b"], "distill.teacher is a and distill.logits is b, which are two ways to the same"),
        (["teacher=''"], "distill.teacher is empty; it must be a folder, or null"),
        (["logits=b", "split_teacher=false"], "distill.split_teacher is false without distill.teacher"),
        (["teacher=a", "weight=1.1"], "distill.weight is 1.1; it must be from 0 to 1"),
        (["teacher=a", "weight_end=-0.1"], "distill.weight_end is -0.1; it must be from 0 to 1"),
        (["teacher=a", "weight=nan"], "distill.weight is nan; it must be from 0 to 1"),
        (["teacher=a", "temperature=0"], "distill.temperature is 0.0; it must be greater than 0"),
        (["teacher=a", "temperature_end=inf"], "distill.temperature_end is inf; it must be greater than 0"),
        (["teacher=a", "top_k=0"], "distill.top_k is 0; it must be from 1 to model.language.vocab_size 2048"),
        (["teacher=a", "top_k=2049"], "distill.top_k is 2049; it must be from 1 to"),
        (["teacher=a", "top_k=8", "top_k_end=0"], "distill.top_k_end is 0; it must be from 1 to"),
        (["teacher=a", "top_k_end=8"], "distill.top_k_end is 8 without distill.top_k"),
        (["teacher=a", "!parallel.pipeline=2"], "parallel.pipeline is 2 with distill; .* set parallel.pipeline=1"),
    ],
)
def test_refused(keys, message, recipe_file):
    overrides = [key[1:] if key.startswith("!") else f"distill.{key}" for key in keys]
    with pytest.raises(UserError, match=message):
        check_recipe(load_recipe(recipe_file(), overrides), 1)


@pytest.mark.parametrize(
    "keys", [["teacher=a"], ["logits=b", "top_k=8", "top_k_end=2"], ["teacher=a", "weight=0", "weight_end=1"]]
)
def test_accepted(keys, recipe_file):
    check_recipe(load_recipe(recipe_file(), [f"distill.{key}" for key in keys]), 1)


def test_the_full_scale_recipe_is_the_papers():
    recipe, missing, _ = load_without_data("text_pretrain", [])
    check_recipe(recipe, 512)
    assert missing == ["data.root", "distill.teacher", "init_from"]
    tokens = recipe.train.steps * recipe.train.global_batch_size * recipe.data.sequence_length
    assert tokens == pytest.approx(9.3e12, rel=1e-5)
