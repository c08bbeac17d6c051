"""Recipes compose from blocks, overrides and the typed schema."""

from pathlib import Path

import pytest

from nemo_bluelm import resources
from nemo_bluelm.config.aliases import ALIASES
from nemo_bluelm.config.checks import alignment, check_recipe
from nemo_bluelm.config.compose import compose, load_recipe, load_without_data, to_yaml
from nemo_bluelm.config.keys import did_you_mean, schema_keys
from nemo_bluelm.config.schema import Dtype, Part, Recipe, SourceConfig, geometry_of
from nemo_bluelm.errors import UserError

FULL_SCALE = ["data.root=corpus", "init_from=run", "init_vision_from=null"]


STAGES = ["align_projector", "joint_pretrain", "reasoning_pretrain", "decay", "long_context", "sft"]


@pytest.mark.parametrize("name", [f"tiny/{stage}" for stage in STAGES])
def test_tiny_recipes_run_on_one_and_two_processes(name):
    recipe = load_recipe(name, [])
    for world_size in (1, 2):
        check_recipe(recipe, world_size)
    assert geometry_of(recipe.model).tokens_per_tile == 4


@pytest.mark.parametrize("name", STAGES)
def test_full_scale_recipes_run_on_one_node(name):
    recipe = load_recipe(name, FULL_SCALE)
    check_recipe(recipe, 8)
    assert geometry_of(recipe.model).tokens_per_tile == 196
    assert recipe.model.language.vocab_size == 100_096
    assert recipe.precision.dtype is Dtype.bf16


@pytest.mark.parametrize("name", ["joint_pretrain", "tiny/joint_pretrain"])
def test_joint_mixture_is_the_papers(name):
    data = load_recipe(name, FULL_SCALE).data
    images = sum(source.weight for key, source in data.sources.items() if key in ("image_text", "digits", "photos"))
    assert images / sum(source.weight for source in data.sources.values()) == pytest.approx(0.6)


@pytest.mark.parametrize("stage, tokens", [("joint_pretrain", 4e12), ("reasoning_pretrain", 2.5e12)])
def test_full_scale_tokens_are_the_papers(stage, tokens):
    recipe = load_recipe(stage, FULL_SCALE)
    step = recipe.train.global_batch_size * recipe.data.sequence_length
    assert recipe.train.steps * step == pytest.approx(tokens, rel=1e-5)


def test_every_packaged_recipe_and_block_composes():
    for name in resources.packaged_recipes():
        load_without_data(name, [])
    for block in (
        file for file in resources.conf_dir().rglob("*.yaml") if file.parent.name not in ("tasks", "cluster")
    ):
        group, option = block.parent.name, block.stem
        if group == "rewards":
            recipe = load_recipe("tiny/grpo", ["init_from=run", f"+rewards@environments.mine={option}"])
            assert recipe.environments["mine"].rewards
        else:
            load_recipe("tiny/sft", [f"{group}={option}"])


def test_result_is_typed(recipe_file):
    recipe = load_recipe(recipe_file(), ["train.freeze=[vision]"])
    assert isinstance(recipe, Recipe)
    assert recipe.train.freeze == [Part.vision]
    assert isinstance(recipe.data.sources["text"], SourceConfig)
    assert recipe.run_dir == "outputs/runs/probe"
    assert recipe.optim.beta2 == 0.98


@pytest.mark.parametrize("name", ["recipes/tiny/sft.yaml", "tiny/sft.yaml", "tiny/sft", "./tiny/sft"])
def test_packaged_recipe_by_name_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name, []).name == "tiny_sft"


def test_overrides_change_values_and_blocks(recipe_file):
    recipe = load_recipe(
        recipe_file(),
        ["model=bluelm_2_5_3b", "parallel.tensor=2", "data.root='/a b/c'", "+data.sources={more: {shards: [m.tar]}}"],
    )
    assert recipe.model.language.num_layers == 32
    assert recipe.parallel.tensor == 2
    assert recipe.data.root == "/a b/c"
    assert list(recipe.data.sources) == ["text", "more"]
    assert list(load_recipe("tiny/sft", ["~data.sources.text"]).data.sources) == ["digits", "photos", "prose", "needle"]


def test_own_blocks_beside_an_own_recipe(tmp_path, recipe_file):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("language: {num_layers: 7}\n")
    path = recipe_file(("model: tiny", "model: mine"), name="my recipe.v2.yaml")
    assert load_recipe(path, []).model.language.num_layers == 7
    assert load_recipe(path, ["model=tiny"]).model.language.num_layers == 2


def test_a_recipe_can_extend_another(recipe_file):
    recipe_file()
    path = recipe_file(text="defaults: [probe, _self_]\ntrain: {steps: 3}\n", name="shorter.yaml")
    recipe = load_recipe(path, ["model=bluelm_2_5_3b"])
    assert (recipe.train.steps, recipe.train.global_batch_size) == (3, 4)
    assert recipe.model.vision.num_layers == 27


def test_composing_leaves_no_trace(recipe_file, tmp_path, monkeypatch, capfd):
    path, here = recipe_file(), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    load_recipe(path, [])
    assert Path.cwd() == here and not list(here.iterdir())
    assert capfd.readouterr() == ("", "")


def test_resolved_recipe_reads_back_equal(recipe_file):
    recipe = load_recipe(recipe_file(), ["train.freeze=[vision,language]", "optim.schedule=constant"])
    again = recipe_file(text=to_yaml(recipe), name="again.yaml")
    assert load_recipe(again, []) == recipe


def test_question_marks_demand_a_key_that_has_a_default(recipe_file):
    path = recipe_file(extra="init_from: ???\nseed: ???\n")
    with pytest.raises(UserError, match="init_from, seed are mandatory"):
        load_recipe(path, [])
    assert load_recipe(path, ["init_from=null", "seed=1234"]).init_from is None


def test_without_data_what_is_missing_is_told():
    recipe, missing, config = load_without_data("sft", [])
    assert missing == ["data.root", "init_from"]
    assert config["data"]["root"] == "???" and config["precision"]["dtype"] == "bf16"
    check_recipe(recipe, 8)


def test_alignment_follows_context_parallelism(recipe_file):
    path = recipe_file()
    assert alignment(load_recipe(path, [])) == 1
    assert alignment(load_recipe(path, ["parallel.context=2"])) == 4


def test_keys_are_those_of_the_schema():
    keys = schema_keys()
    assert {"optim.lr", "model.language.yarn.factor", "data.sources.NAME.weight", "model.geometry.tile"} <= set(keys)
    assert compose("tiny/sft", []).keys() == {key for key in keys if "." not in key}


@pytest.mark.parametrize(
    "key, hint",
    [
        ("optim.lrr", "did you mean optim.lr?"),
        ("lr", "did you mean optim.lr?"),
        ("train.lr", "did you mean optim.lr?"),
        ("learning_rate", "a recipe has name, run_dir"),
        ("optimizer.lr", "did you mean optim.lr?"),
        ("data.sources.digits.wieght", "did you mean data.sources.digits.weight?"),
        ("model.num_layers", "did you mean model.vision.num_layers?"),
        ("parallel.tensor_parallel", "did you mean parallel.tensor?"),
        ("optim.zzz", "optim has lr, min_lr"),
    ],
)
def test_nearest_key(key, hint):
    assert hint in did_you_mean(key)


def test_other_tools_words_for_keys(recipe_file):
    """As overrides they are taken; a recipe that has one is told ours."""
    for alias, key in ALIASES.items():
        assert key in schema_keys() and alias not in schema_keys()
    words = ["init_from=run", "grpo.samples_per_prompt=4", "loss_fn.ratio_clip_max=0.28"]
    grpo = load_recipe("tiny/grpo", words).grpo
    assert (grpo.num_generations_per_prompt, grpo.loss.ratio_clip_max) == (4, 0.28)
    with pytest.raises(UserError, match="unknown key grpo.samples_per_prompt; here it is grpo.num_generations_per_pro"):
        load_recipe(recipe_file(extra="grpo: {samples_per_prompt: 4}\n"), [])
