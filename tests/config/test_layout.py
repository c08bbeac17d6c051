"""Every impossible layout is refused with one that passes."""

import random
import re

import pytest

from nemo_bluelm.config.checks import check_recipe
from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.errors import UserError

FIRST = re.compile(r"; the nearest that fits: (.+)$")
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
]


def _refusal(overrides: list[str], world_size) -> str | None:
    try:
        check_recipe(load_recipe("tiny/sft", overrides), world_size)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("overrides, world_size", CASES)
def test_the_suggested_layout_passes(overrides, world_size):
    message = _refusal(overrides.split(), world_size)
    assert message, "the case must be refused"
    assert _refusal([*overrides.split(), *FIRST.search(message)[1].split()], world_size) is None, message


def test_random_layouts_pass_or_are_refused_with_one_that_passes():
    rng, refused = random.Random(0), 0
    for _ in range(60):
        choices = {
            "parallel.tensor": [1, 1, 2, 3, 4],
            "parallel.sequence": ["false", "true"],
            "parallel.pipeline": [1, 1, 2, 3, 4],
            "parallel.virtual_pipeline": ["null", "null", 2, 3],
            "parallel.first_stage_layers": ["null", "null", 1, 5],
            "parallel.context": [1, 1, 2, 3],
            "parallel.context_comm": ["all_gather", "a2a"],
            "data.sequence_length": [512, 1000, 768],
            "train.micro_batch_size": [1, 2, 3],
            "train.global_batch_size": [4, 6, 32],
            "model.language.num_layers": [8],
        }
        overrides = [f"{key}={rng.choice(values)}" for key, values in choices.items()]
        world_size = rng.choice([None, 1, 2, 4, 6, 8, 12])
        if message := _refusal(overrides, world_size):
            refused += 1
            assert _refusal([*overrides, *FIRST.search(message)[1].split()], world_size) is None, message
    assert refused > 20


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


def test_no_layout_mends_a_model_that_fp8_cannot_take():
    message = _refusal(["precision=fp8_blockwise"], 1)
    assert "num_query_groups * kv_channels is 64" in message and "fits" not in message
