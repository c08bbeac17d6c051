"""An ablation file becomes shared stages and variants; what is wrong with it is told in one line."""

from pathlib import Path

import pytest

from nemo_bluelm import resources
from nemo_bluelm.config.ablation import load_ablation
from nemo_bluelm.config.checks import check_recipe
from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.measures import make_measures
from nemo_bluelm.train.chain import load_stage
from nemo_bluelm.train.continuity import check_shapes

ABLATION = """
name: rates
stages:
  base: {recipe: mine}
common:
  recipe: mine
  overrides: ["init_from=${run:base}", train.steps=3, seed=5]
variants:
  low: {label: a low rate, overrides: [optim.lr=1e-5]}
  high: {overrides: [optim.lr=1e-2, train.steps=4]}
measures:
  learning: {reference: low}
"""


@pytest.fixture
def ablation(recipe_file):
    """Writes an ablation beside the recipe ``mine``: the one above with ``replace`` pairs applied."""
    recipe_file(name="mine.yaml")

    def write(*replace: tuple[str, str]) -> str:
        return recipe_file(*replace, text=ABLATION, name="rates.yaml")

    return write


def test_variants_are_stages_that_have_much_in_common(ablation):
    found = load_ablation(ablation(), ["high.optim.lr=5", "train.global_batch_size=8"])
    assert found.out == Path("outputs/ablations/rates")
    assert [stage.name for stage in found.chain.stages] == ["base", "low", "high"]
    assert found.variants == {"low": "a low rate", "high": "high"}
    low, high = (load_stage(found.chain.stage(name)) for name in found.variants)
    assert (low.optim.lr, low.train.steps, low.seed) == (1e-5, 3, 5)
    assert (high.optim.lr, high.train.steps, high.seed) == (5, 4, 5)
    assert low.train.global_batch_size == 8
    assert low.run_dir == "outputs/ablations/rates/runs/low"
    assert low.init_from == high.init_from == "outputs/ablations/rates/runs/base"


def test_the_folder_may_be_chosen(ablation, tmp_path):
    found = load_ablation(ablation(), [], tmp_path / "it's here")
    assert load_stage(found.chain.stage("low")).run_dir == str(tmp_path / "it's here" / "runs" / "low")


def test_options_of_measures_may_be_set(ablation):
    found = load_ablation(ablation(), ["learning.reference=high", "low.seed=7"])
    assert found.measures == {"learning": {"reference": "high"}}
    assert load_stage(found.chain.stage("low")).seed == 7
    found = load_ablation(ablation(("learning: {reference: low}", "needle:")), ["needle.lengths=[64,128]"])
    assert found.measures == {"needle": {"lengths": [64, 128]}}


def test_what_is_shared_may_be_empty(ablation):
    found = load_ablation(ablation(("  base: {recipe: mine}", "  {}"), ('"init_from=${run:base}", ', "")), [])
    assert [stage.name for stage in found.chain.stages] == ["low", "high"]


@pytest.mark.parametrize("name", resources.packaged_recipes("ablation"))
def test_packaged_ablations(name):
    """Every run composes and fits the one that it starts from; every measure is one that there is."""
    found = load_ablation(name.removeprefix("ablations/"), [])
    assert found.chain.name == name.removeprefix("ablations/") and len(found.variants) >= 2
    recipes = {}
    for stage in found.chain.stages:
        recipe = recipes[str(stage.folder)] = load_stage(stage)
        check_recipe(recipe, world_size=1)
        if recipe.init_from is not None:
            check_shapes(recipe, recipes[recipe.init_from])
    variants = [recipes[str(found.chain.stage(name).folder)] for name in found.variants]
    assert len({recipe.train.steps for recipe in variants}) == len({recipe.init_from for recipe in variants}) == 1
    make_measures(found.measures, name)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("variants:", "varaints:", "unknown key varaints; did you mean variants"),
        ("common:\n  recipe: mine", "common:\n  recepe: mine", "common: unknown key recepe; did you mean recipe"),
        ("overrides: [optim.lr=1e-5]", "override: [optim.lr=1e-5]", "stage low: unknown key override; did you mean"),
        ("low: {label: a low rate, overrides: [optim.lr=1e-5]}", "low: cheap", "stage low: a stage is a mapping"),
        ("label: a low rate", "label: 3", "variant low: label is 3; it must be a short text"),
        ("high: {", "base: {", "stage base is there twice, in stages and in variants"),
        ("optim.lr=1e-2", '"init_from=${run:low}"', "variant high refers to variant low"),
        ("optim.lr=1e-2", '"init_from=${run:bse}"', "stage high refers to stage bse, which does not stand before it"),
        ("high: {", "high: {prune: base, ", "variant high is a pruning"),
        ("seed=5]", "seed=5", "rates.yaml"),
        ('["init_from=${run:base}", train.steps=3, seed=5]', "seed=5", "common: overrides must be a list"),
        ("measures:\n  learning: {reference: low}", "measures: learning", "measures must be a mapping"),
        ("variants:", "variants: {}\nstages:", "rates.yaml"),
    ],
)
def test_a_mistake_in_the_file(old, new, message, ablation):
    with pytest.raises(UserError, match=message):
        load_ablation(ablation((old, new)), [])


def test_runs_are_in_the_folder_of_the_ablation(ablation):
    with pytest.raises(UserError, match="run_dir=x: an ablation's runs are in its folder, which --out DIR names"):
        load_ablation(ablation(), ["run_dir=x"])


def test_train_refuses_an_ablation(ablation, cli):
    path = ablation()
    code, _, error = cli("train", path)
    assert code == 2 and f"{path}: is an ablation; 'nemo-bluelm ablate {path}' runs it" in error
