"""Recomputing activations changes memory, not results; the recipe's precision reaches Megatron-Core's configuration."""

import pytest
import torch
from megatron_world import gradients, make_pack, random_tiles, random_tokens, small_config

from nemo_bluelm.config.schema import (
    Dtype,
    Fp8Config,
    Fp8Recipe,
    ParallelConfig,
    Part,
    PrecisionConfig,
    Recompute,
    RecomputeConfig,
)
from nemo_bluelm.model.bluelm import BlueLMModel
from nemo_bluelm.model.config import language_transformer_config, vision_transformer_config
from nemo_bluelm.model.init import initialize

pytestmark = pytest.mark.usefixtures("world")

FP32 = PrecisionConfig(Dtype.fp32)


def loss_gradients_and_kept(recompute: RecomputeConfig) -> tuple[float, dict[str, torch.Tensor], int]:
    """Of one pack with two tiles; the last number is the bytes that the forward pass keeps for the backward pass."""
    shape = small_config()
    config = language_transformer_config(shape.language, ParallelConfig(), FP32, recompute)
    vision = vision_transformer_config(shape.vision, config, FP32, recompute)
    model = BlueLMModel(config, shape, 4, 512, vision_config=vision)
    initialize(model, shape.language, seed=1)
    pack = make_pack([[4] * 8 + random_tokens(150, 96, seed=3), random_tokens(90, 96, seed=4)], random_tiles(2, 56, 5))
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = (model(pack, pack.labels) * pack.loss_mask).sum()
    loss.backward()
    return float(loss), gradients(model), sum(kept.values())


@pytest.fixture(scope="module")
def kept_all(world):
    return loss_gradients_and_kept(RecomputeConfig())


@pytest.mark.parametrize(
    "recompute",
    [
        RecomputeConfig(language=Recompute.mlp),
        RecomputeConfig(language=Recompute.full),
        RecomputeConfig(language=Recompute.full, language_layers=1),
        RecomputeConfig(vision=Recompute.mlp),
        RecomputeConfig(vision=Recompute.full, language=Recompute.full),
    ],
    ids=str,
)
def test_same_gradients_for_less_memory(recompute, kept_all):
    loss, grads, kept = loss_gradients_and_kept(recompute)
    assert loss == kept_all[0]
    assert grads.keys() == kept_all[1].keys()
    for name, grad in kept_all[1].items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-6, atol=1e-7, msg=name)
    assert kept < kept_all[2]


def megatron_fp8(part: Part, fp8: Fp8Config) -> dict:
    shape = small_config()
    precision = PrecisionConfig(fp8=fp8)
    config = language_transformer_config(shape.language, ParallelConfig(), precision)
    if part == Part.vision:
        config = vision_transformer_config(shape.vision, config, precision)
    names = ("fp8", "fp8_recipe", "first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
    return {name: getattr(config, name) for name in names if config.fp8}


def test_fp8_reaches_the_parts_that_the_recipe_names():
    current = Fp8Config(recipe=Fp8Recipe.current)
    assert megatron_fp8(Part.language, Fp8Config()) == {}
    assert megatron_fp8(Part.language, current)["fp8_recipe"] == "tensorwise"
    assert megatron_fp8(Part.vision, current) == {}
    both = Fp8Config(recipe=Fp8Recipe.delayed, parts=[Part.language, Part.vision])
    assert megatron_fp8(Part.vision, both)["fp8_recipe"] == "delayed"
    assert megatron_fp8(Part.language, Fp8Config(recipe=Fp8Recipe.blockwise))["fp8"] == "e4m3"
    ends = megatron_fp8(Part.language, Fp8Config(Fp8Recipe.current, [Part.language], 1, 2))
    assert ends["first_last_layers_bf16"]
    assert (ends["num_layers_at_start_in_bf16"], ends["num_layers_at_end_in_bf16"]) == (1, 2)
