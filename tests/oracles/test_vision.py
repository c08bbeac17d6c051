"""The ViT computes what transformers' SiglipVisionModel computes with the same weights."""

import pytest
import torch
from hf_weights import grads, hf_vision, load, normalized, state, vision_tensors
from megatron_world import assert_all_near, assert_near, gradients, random_tiles, small_config

from nemo_bluelm.config.schema import Dtype, ParallelConfig, PrecisionConfig, geometry_of
from nemo_bluelm.model.config import language_transformer_config, vision_transformer_config
from nemo_bluelm.model.vision import VisionTower

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture(params=[56, 70], ids=["4x4 patches", "5x5 patches"])
def pair(request):
    """Our ViT and SigLIP with the same weights, and tiles."""
    config = small_config(tile=request.param)
    oracle = hf_vision(config, seed=1)
    beside = language_transformer_config(config.language, ParallelConfig(), PrecisionConfig(Dtype.fp32))
    tower = VisionTower(vision_transformer_config(config.vision, beside), geometry_of(config))
    load(tower, vision_tensors(state(oracle), config.vision.num_attention_heads))
    return tower, oracle, random_tiles(3, request.param, seed=2), config


def test_features(pair):
    tower, oracle, tiles, config = pair
    with torch.no_grad():
        features = tower(tiles)
        expected = oracle(normalized(tiles)).last_hidden_state
    assert features.shape == (3, (config.geometry.tile // 14) ** 2, config.vision.hidden_size)
    assert_near(features, expected, 1e-5)


def test_gradients(pair):
    tower, oracle, tiles, config = pair
    expected = oracle(normalized(tiles)).last_hidden_state
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (expected * weights).sum().backward()
    (tower(tiles) * weights).sum().backward()
    assert_all_near(gradients(tower), vision_tensors(grads(oracle), config.vision.num_attention_heads), 1e-4)


def test_a_tile_does_not_see_its_neighbours(pair):
    tower, _, tiles, _ = pair
    with torch.no_grad():
        alone = torch.cat([tower(tile[None]) for tile in tiles])
        assert_near(tower(tiles), alone, 1e-5)
