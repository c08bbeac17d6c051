"""A pipeline file becomes stages; what is wrong with it is told in one line."""

from pathlib import Path

import pytest

from nemo_bluelm import resources
from nemo_bluelm.config.checks import check_recipe
from nemo_bluelm.config.compose import load_recipe, load_without_data
from nemo_bluelm.config.pipeline import is_pipeline, load_pipeline
from nemo_bluelm.errors import UserError
from nemo_bluelm.train.continuity import check_shapes

CHAIN = """
name: chain
stages:
  teacher: {recipe: tiny/text_teacher}
  cut: {prune: teacher, recipe: tiny/align_projector}
  align:
    recipe: mine
    overrides: ["init_from=${run:cut}", optim.lr=1e-4]
"""


@pytest.fixture
def chain(tmp_path, recipe_file):
    """Writes a pipeline beside the recipe ``mine``: the one above with ``replace`` pairs applied."""
    recipe_file(name="mine.yaml")

    def write(*replace: tuple[str, str]) -> str:
        return recipe_file(*replace, text=CHAIN, name="chain.yaml")

    return write


def test_stages_in_order_with_their_folders_and_overrides(chain, tmp_path):
    path = chain()
    assert is_pipeline(path) and not is_pipeline("tiny/sft") and not is_pipeline(str(tmp_path / "mine.yaml"))
    pipeline = load_pipeline(path, ["seed=7", "align.train.steps=3", "+align.data.sources={a: {shards: [b]}}"])
    teacher, cut, align = pipeline.stages
    assert [stage.name for stage in pipeline.stages] == ["teacher", "cut", "align"]
    assert [stage.teacher for stage in pipeline.stages] == [None, "teacher", None]
    assert [stage.after for stage in pipeline.stages] == [(), ("teacher",), ("cut",)]
    assert cut.folder == Path("outputs/runs/chain/cut")
    assert teacher.overrides == ("seed=7", "run_dir='outputs/runs/chain/teacher'")
    recipe = load_recipe(align.recipe, list(align.overrides))
    assert (recipe.name, recipe.seed, recipe.train.steps, recipe.optim.lr) == ("probe", 7, 3, 1e-4)
    assert recipe.init_from == "outputs/runs/chain/cut"
    assert list(recipe.data.sources) == ["text", "a"]


def test_a_folder_may_have_any_name(chain, tmp_path):
    odd = tmp_path / "it's, a [folder]={x}"
    align = load_pipeline(chain(), [f"run_dir={str(odd)!r}"]).stage("align")
    recipe = load_recipe(align.recipe, list(align.overrides))
    assert recipe.init_from == str(odd / "cut") and recipe.run_dir == str(odd / "align")


def test_the_command_line_comes_last(chain):
    align = load_pipeline(chain(), ["align.optim.lr=5", "align.init_from=elsewhere"]).stage("align")
    recipe = load_recipe(align.recipe, list(align.overrides))
    assert (recipe.optim.lr, recipe.init_from) == (5, "elsewhere")


@pytest.mark.parametrize("name", resources.packaged_recipes("pipeline"))
def test_packaged_pipelines(name):
    """Every stage composes, needs nothing but data and the first one's teacher, and fits the one it starts from."""
    assert is_pipeline(name) and is_pipeline(f"recipes/{name}.yaml")
    recipes = {}
    for stage in load_pipeline(name, []).stages:
        recipe, missing, _ = load_without_data(stage.recipe, list(stage.overrides))
        first = ["init_from", "distill.teacher"] if not recipes or stage.teacher else []
        first += ["init_vision_from"] if stage.name == "align_projector" else []
        assert set(missing) <= {"data.root", *first}
        check_recipe(recipe, 8 if name == "pipeline" else 1)
        assert recipe.run_dir == str(stage.folder)
        recipes[str(stage.folder)] = recipe
        if recipe.init_from in recipes:
            check_shapes(recipe, recipes[recipe.init_from])
        else:
            assert recipe.init_from in (None, "unset")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: chain", "nane: chain", "unknown key nane; did you mean name"),
        ("name: chain", "name: a/b", "name is 'a/b'; it must be a word"),
        ("recipe: mine", "recepe: mine", "stage align: unknown key recepe; did you mean recipe"),
        ("recipe: mine", "recipe: [mine]", "stage align: recipe is .*; it must be a recipe file"),
        ("prune: teacher", "prune: [teacher]", "stage cut: prune is .*teacher.*; it must be the name of an earlier"),
        ("prune: teacher", "prune: taecher", "stage cut refers to stage taecher, which does not stand before it"),
        ("${run:cut}", "${run:align}", "stage align refers to stage align, .* earlier ones are teacher, cut"),
        ("{recipe: tiny/text_teacher}", "tiny/text_teacher", "stage teacher: a stage is a mapping of recipe"),
        ("optim.lr=1e-4]", "run_dir=x]", "stage align: run_dir=x: the pipeline's run_dir holds"),
        ("optim.lr=1e-4]", "{a: 1}]", "stage align: overrides must be a list of texts"),
        ("  align:", "  optim:", "stage optim: a recipe has a key of this name"),
        ("  align:", "  a/b:", "stage 'a/b': a stage's name is made of letters"),
    ],
)
def test_a_mistake_in_the_file(old, new, message, chain):
    with pytest.raises(UserError, match=message):
        load_pipeline(chain((old, new)), [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("init_from=x", "each stage has its own init_from; for one stage say teacher.init_from=x"),
        ("run_dir=", "run_dir is empty"),
        ("run_dir=[", "not a valid override"),
    ],
)
def test_a_mistake_on_the_command_line(override, message, chain):
    with pytest.raises(UserError, match=message):
        load_pipeline(chain(), [override])


def test_only_train_takes_a_pipeline(chain, cli):
    code, _, error = cli("plan", chain())
    assert code == 2 and "is a pipeline, which only 'nemo-bluelm train' takes" in error
