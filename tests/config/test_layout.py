"""Every impossible layout is refused with one that passes."""

import random
import re

import pytest
from omegaconf import OmegaConf

from nemo_bluelm.config.checks import check_recipe
from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.layout import problems
from nemo_bluelm.config.schema import Recipe
from nemo_bluelm.errors import UserError

# All that a refusal offers to paste: the nearest layout, and what FP8 needs where no layout of the model has it.
OFFERS = re.compile(r"the nearest that fits: (.+)$|; FP8 \w+ fits with ([^;]+)")
RECIPES = ["tiny/sft", "tiny/sft", "bench/mixed", "bench/text_4k", "bench/text_32k"]
CHOICES = {
    "parallel.tensor": [1, 1, 2, 3, 4],
    "parallel.sequence": ["false", "true"],
    "parallel.pipeline": [1, 1, 2, 3, 4],
    "parallel.virtual_pipeline": ["null", "null", 2, 3],
    "parallel.first_stage_layers": ["null", "null", 1, 5, 6],
    "parallel.context": [1, 2, 3, 3],
    "parallel.context_comm": ["all_gather", "a2a"],
    "precision.dtype": ["bf16"],
    "precision.fp8.recipe": ["null", "null", "delayed", "current", "current", "blockwise"],
    "precision.fp8.parts": ["[language]", "[language]", "[vision,language]"],
    "precision.fp8.bf16_first_layers": [0, 0, 0, 1],
    "data.sequence_length": [None, None, None, 500, 1000, 4000, 4096],
    "train.micro_batch_size": [1, 2, 3],
    "train.global_batch_size": [4, 6, 32],
    "model.language.num_layers": [None, 8],
    "model.language.ffn_hidden_size": [None, None, 392],
    "model.vision.ffn_hidden_size": [None, None, 1100],
    "model.language.yarn.original_max_position_embeddings": [None, None, 4100],
}
CASES = [
    ("parallel.tensor=3", 3),
    ("parallel.tensor=2", 5),
    ("parallel.tensor=4 parallel.sequence=true", 4),
    ("parallel.pipeline=3", 3),
    ("parallel.pipeline=2 parallel.virtual_pipeline=3", 2),
    ("parallel.pipeline=2 parallel.virtual_pipeline=2 train.global_batch_size=3 model.language.num_layers=4", 2),
    ("parallel.pipeline=3 parallel.first_stage_layers=1", 3),
    ("parallel.first_stage_layers=1 parallel.virtual_pipeline=2", 1),
    ("parallel.context=3 data.sequence_length=500", 3),
    ("parallel.context=2 parallel.tensor=2 parallel.sequence=true data.sequence_length=498", 4),
    ("parallel.context=2 parallel.tensor=2 parallel.context_comm=a2a", 4),
    ("train.micro_batch_size=3 train.global_batch_size=4", None),
    ("train.micro_batch_size=3", 7),
    ("precision=fp8_current data.sequence_length=500 train.micro_batch_size=2", 1),
    ("model=bluelm_2_5_3b precision=fp8_blockwise parallel.tensor=4", 4),
    ("precision=fp8_blockwise", 1),
    ("precision=fp8_blockwise parallel.tensor=3 precision.fp8.bf16_first_layers=1", 6),
    ("precision=fp8_current precision.fp8.parts=[language,vision] model.vision.hidden_size=72", 1),
    ("precision=fp8_blockwise model.language.kv_channels=64 data.sequence_length=100", 1),
    ("precision=fp8_blockwise model.language.kv_channels=64 data.sequence_length=100 train.micro_batch_size=2", 2),
]


def _refusal(overrides: list[str], world_size, recipe: str = "tiny/sft") -> str | None:
    return _refused(load_recipe(recipe, overrides), world_size)


def _refused(recipe: Recipe, world_size) -> str | None:
    try:
        check_recipe(recipe, world_size)
    except UserError as error:
        return str(error)
    return None


def _offers(message: str) -> list[list[str]]:
    return [(nearest or fp8).split() for nearest, fp8 in OFFERS.findall(message)]


@pytest.mark.parametrize("overrides, world_size", CASES)
def test_the_suggested_layout_passes(overrides, world_size):
    message = _refusal(overrides.split(), world_size)
    assert message and _offers(message), "the case must be refused, with a way out"
    for offer in _offers(message):
        assert _refusal([*overrides.split(), *offer], world_size) is None, message


def test_random_layouts_pass_or_are_refused_with_one_that_passes():
    """All that is offered passes every check when it is pasted, and no layout is refused without an offer."""
    rng, refused, offered = random.Random(0), 0, []
    bases = {name: OmegaConf.structured(load_recipe(name, [])) for name in RECIPES}

    def changed(name: str, overrides: list[str]) -> Recipe:  # Hydra composes five recipes a second, this hundreds
        return OmegaConf.to_object(OmegaConf.merge(bases[name], OmegaConf.from_dotlist(overrides)))

    while refused < 60:
        name, world_size = rng.choice(RECIPES), rng.choice([None, 1, 4, 6, 8, 12, 24, 48])
        chosen = {key: rng.choice(values) for key, values in CHOICES.items()}
        overrides = [f"{key}={value}" for key, value in chosen.items() if value is not None]
        recipe = changed(name, overrides)
        problem = next(problems(recipe, world_size), None)
        message = _refused(recipe, world_size)
        if problem is None or not message.startswith(problem):  # it passes, or something else is wrong as well
            continue
        assert _offers(message), message
        for offer in _offers(message):
            assert _refused(changed(name, [*overrides, *offer]), world_size) is None, f"{name} {overrides}: {message}"
            offered += offer
        refused += 1
    for way in ("sequence_length=", "fp8.recipe=null", "kv_channels=", "ffn_hidden_size=", "fp8.parts=[language]"):
        assert any(way in offer for offer in offered), way


@pytest.mark.parametrize(
    "recipe, overrides, world_size",
    [
        ("bench/mixed", "parallel.tensor=4 parallel.sequence=true parallel.context=3 precision=fp8_delayed", 12),
        (
            "bench/text_32k",
            "parallel.tensor=4 parallel.pipeline=4 parallel.virtual_pipeline=3 parallel.first_stage_layers=6 "
            "parallel.context=3 precision=fp8_delayed",
            48,
        ),
    ],
)
def test_a_longer_pack_than_rope_reaches_is_not_suggested(recipe, overrides, world_size):
    message = _refusal(overrides.split(), world_size, recipe)
    assert "data.sequence_length=" in message
    assert _refusal([*overrides.split(), *_offers(message)[0]], world_size, recipe) is None, message


def test_a_pack_no_longer_than_a_tile_is_not_suggested():
    message = _refusal(
        ["precision=fp8_current", "data.sequence_length=197", "train.micro_batch_size=1"], 1, "bench/mixed"
    )
    assert _offers(message) == [["data.sequence_length=208"]], "192 is nearer, and a tile has 196 tokens"


def test_a_small_change_is_preferred():
    message = _refusal(["parallel.context=2", "data.sequence_length=510"], 2)
    assert message.endswith("the nearest that fits: data.sequence_length=512")
    message = _refusal(["parallel.tensor=2", "parallel.context=2", "parallel.context_comm=a2a"], 4)
    assert message.endswith("the nearest that fits: parallel.context_comm=all_gather")


def test_joined_packs_share_the_alignment():
    """Rows of a rank are what must divide, not those of each pack."""
    fp8 = ["precision=fp8_current", "data.sequence_length=504"]
    assert "multiple of 16" in _refusal(fp8, 1)
    assert _refusal([*fp8, "train.micro_batch_size=2"], 1) is None


def test_a_model_that_fp8_cannot_take_is_offered_sizes_and_bf16():
    message = _refusal(["precision=fp8_blockwise"], 1)
    assert "model.language.num_query_groups 2 * model.language.kv_channels 32 is 64, not a multiple of 128" in message
    assert _offers(message) == [["model.language.kv_channels=64"], ["precision.fp8.recipe=null"]]
    message = _refusal(["precision=fp8_blockwise", "parallel.tensor=3"], 6)
    assert _offers(message)[1][:2] == ["precision.fp8.recipe=null", "parallel.tensor=2"]
