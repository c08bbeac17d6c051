"""Too little text beside images is told; packaged recipes have enough of it or say why they don't."""

import re

import pytest

from nemo_bluelm.config.checks import check_recipe
from nemo_bluelm.config.compose import load_recipe, load_without_data, to_yaml
from nemo_bluelm.config.grpo import Objective
from nemo_bluelm.config.schema import Part, geometry_of
from nemo_bluelm.data.open import open_data
from nemo_bluelm.errors import UserError
from nemo_bluelm.resources import packaged_recipes
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, Origin
from nemo_bluelm.train.guards import control_token_notice, positions_notice, text_share_notice
from tests.conftest import one_line


def notice(share, *overrides):
    return text_share_notice(load_recipe("tiny/align_projector", ["train.freeze=[]", *overrides]), share)


def test_little_text_is_told_in_one_line():
    told = notice(0.2)
    assert told.startswith("20.0% of the mixture's tokens are of samples without images, less than 35%")
    assert "\n" not in told and "train.min_text_share" in told
    assert notice(0.0) and notice(0.349)


def test_enough_text_or_nothing_to_forget_is_silent():
    assert notice(0.35) is None and notice(1.0) is None
    assert notice(0.2, "train.freeze=[vision,language]") is None


def test_the_recipe_can_demand_more_or_less():
    assert notice(0.2, "train.min_text_share=0.1") is None
    assert notice(0.1 + 0.2, "train.min_text_share=0.3") is None
    assert notice(0.6 - 0.2, "train.min_text_share=0.4") is None  # 0.39999999999999997
    for freeze in ("[]", "[language]"):
        with pytest.raises(UserError, match="min_text_share is 0.5, but 40.0% of the mixture's tokens.*; raise"):
            notice(0.4, "train.min_text_share=0.5", f"train.freeze={freeze}")


def test_train_refuses_before_anything_is_written(corpus, tmp_path, cli_process):
    settings = [f"data.root={corpus}", f"data.index={tmp_path / 'index'}", f"run_dir={tmp_path / 'run'}"]
    ended = cli_process("train", "tiny/joint_pretrain", *settings, "init_from=null", "train.min_text_share=0.9")
    last = ended.stderr.splitlines()[-1]  # on a busy machine the index tells of its progress
    assert "train.min_text_share is 0.9, but 40.0% of" in one_line(ended.returncode, last)
    assert not (tmp_path / "run").exists()


def mixtures():
    """Recipes that learn from a mixture of tokens; prompts and pairs are no such."""
    loaded = {name: load_without_data(name, [])[0] for name in packaged_recipes()}
    return [name for name, recipe in loaded.items() if recipe.objective == Objective.next_token]


@pytest.mark.parametrize("name", [name for name in mixtures() if name.startswith("tiny/")])
def test_tiny_recipes_are_silent_on_their_corpus(name, corpus, tmp_path_factory):
    recipe, _, _ = load_without_data(name, [f"data.root={corpus}"])
    recipe.data.index = str(tmp_path_factory.getbasetemp() / "guards_index")
    check_recipe(recipe, 1)
    plan = open_data(recipe.data, geometry_of(recipe.model), recipe.seed).plan
    assert text_share_notice(recipe, plan.text_share()) is None


@pytest.mark.parametrize("name", [name for name in mixtures() if "/" not in name])
def test_full_scale_recipes_are_silent_on_sources_as_their_names_say(name):
    recipe, _, _ = load_without_data(name, [])
    check_recipe(recipe, None)
    weights = {source: entry.weight for source, entry in recipe.data.sources.items()}
    text = sum(weight for source, weight in weights.items() if "text" in source and "image" not in source)
    assert text_share_notice(recipe, text / sum(weights.values())) is None


def test_control_token_before_the_query_is_told():
    recipe = load_recipe("tiny/sft", ["data.root=."])
    assert control_token_notice(recipe) is None
    before = load_recipe("tiny/sft", ["data.root=.", "data.chat.control_token=before_query"])
    assert "data.chat.control_token is before_query" in control_token_notice(before)


YARN = ["model.language.yarn.factor=8", "model.language.yarn.original_max_position_embeddings=512"]


@pytest.mark.parametrize(
    "then, now, told",
    [
        ([], [], None),
        ([], YARN, None),  # how a context is made longer
        (YARN, YARN, None),
        (YARN, ["model.language.yarn.factor=1"], "model.language.yarn.factor is 1.0, and init_from .* with 8.0"),
        (YARN, [*YARN, "model.language.yarn.mscale=2"], "model.language.yarn.mscale is 2.0, and init_from"),
        ([], ["model.language.rotary_base=500"], "model.language.rotary_base is 500.*set model.language.rotary_base="),
    ],
)
def test_positions_that_mean_something_else_are_told(then, now, told, tmp_path):
    def recipe(overrides):
        return load_recipe("tiny/decay", ["data.root=.", "init_from=null", *overrides])

    (tmp_path / RECIPE_FILE).write_text(to_yaml(recipe(then)))
    notice = positions_notice(recipe(now), Origin("init_from", tmp_path, tuple(Part)))
    assert notice is None if told is None else re.search(told, notice)
    assert positions_notice(recipe(now), Origin("init_vision_from", tmp_path, (Part.vision,))) is None
