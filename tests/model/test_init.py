"""Initial weights: all written, a function of seed and name, with the documented standard deviations."""

import math

import pytest
import torch
from megatron_world import small_config, whole_model

from nemo_bluelm.model.init import initialize, local_shards

pytestmark = pytest.mark.usefixtures("world")

CONFIG = small_config(share_embeddings_and_output_weights=False, num_layers=3)


def initialized(seed, config=CONFIG):
    model = whole_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    initialize(model, config.language, seed)
    return dict(model.named_parameters())


@pytest.fixture(scope="module")
def weights(world):
    return initialized(seed=1)


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_is_written(tied):
    for name, weight in initialized(1, small_config(share_embeddings_and_output_weights=tied)).items():
        assert weight.isfinite().all(), name


def test_every_weight_has_one_global_name():
    model = whole_model(CONFIG)
    total = sum(shard.data.numel() for shard in local_shards(model))
    assert total == sum(parameter.numel() for parameter in model.parameters())
    names = [(shard.key, shard.global_offset) for shard in local_shards(model)]
    assert len(names) == len(set(names))


def test_the_seed_decides(weights):
    again, other = initialized(seed=1), initialized(seed=2)
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]), name
        assert torch.equal(weight, other[name]) == (weight.dim() == 1), name


def test_torchs_own_generator_is_neither_read_nor_moved(weights):
    model = whole_model(CONFIG)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    initialize(model, CONFIG.language, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())


def test_no_two_matrices_are_equal(weights):
    matrices = [(name, weight) for name, weight in weights.items() if weight.dim() > 1]
    for fc1 in [name for name, _ in matrices if name.startswith("language.") and "linear_fc1" in name]:
        matrices += [(f"{fc1} {half}", piece) for half, piece in zip(("gate", "up"), weights[fc1].chunk(2))]
    heads = {}
    for name, weight in matrices:
        beginning = tuple((weight.flatten()[:8] / weight.std()).round(decimals=3).tolist())
        if not name.endswith("gate"):  # the gate is where its fused matrix begins
            assert beginning not in heads, (name, heads[beginning])
            heads[beginning] = name


def test_a_layer_keeps_its_weights_in_a_deeper_model(weights):
    """Weights hang on the name alone, so pipeline stages and other depths agree."""
    shallow = initialized(1, small_config(share_embeddings_and_output_weights=False, num_layers=2))
    for name, weight in shallow.items():
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")) and name.startswith("language."):
            weight = weight * math.sqrt(2 / 3)  # their scale depends on the depth
        torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=0, msg=name)


def test_norms_are_one_and_biases_zero(weights):
    vectors = {name: weight for name, weight in weights.items() if weight.dim() == 1}
    assert len(vectors) > 20
    for name, weight in vectors.items():
        assert weight.eq(0.0 if name.endswith("bias") else 1.0).all(), name


def documented_std(name, weight):
    if name == "vision.position_embedding":
        return 0.02
    if not name.startswith("language."):
        return 1 / math.sqrt(weight[0].numel())
    writes_to_residual_stream = "linear_proj" in name or "linear_fc2" in name
    return 0.05 / math.sqrt(2 * 3) if writes_to_residual_stream else 0.05


def test_standard_deviations(weights):
    for name, weight in weights.items():
        if weight.dim() > 1:
            std, count = documented_std(name, weight), weight.numel()
            assert abs(weight.mean()) < 5 * std / math.sqrt(count), name
            assert abs(weight.std() / std - 1) < 5 / math.sqrt(2 * count), name


def test_the_optimizer_is_told_which_weights_are_pieces():
    model = whole_model(CONFIG)
    initialize(model, CONFIG.language, 1)
    for name, parameter in model.named_parameters():
        piece = name.startswith("language.") and parameter.dim() > 1
        assert getattr(parameter, "tensor_model_parallel", False) == piece, name
        if piece:
            assert parameter.partition_dim == (1 if "linear_proj" in name or "linear_fc2" in name else 0), name
