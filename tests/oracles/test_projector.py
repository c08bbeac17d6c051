"""The projector computes what its description says, written out token by token."""

import math

import numpy as np
import pytest
import torch
from hf_weights import randomize

from nemo_bluelm.config.schema import (
    Activation,
    GeometryConfig,
    LanguageConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
    geometry_of,
)
from nemo_bluelm.model.projector import Projector, fold_tokens


def fold(features: np.ndarray, side: int, merge: int) -> np.ndarray:
    """[side * side, h] -> tokens row by row, each its patches row by row end to end; zeros beyond the grid."""
    hidden = features.shape[1]
    tokens = []
    for top in range(0, side, merge):
        for left in range(0, side, merge):
            token = []
            for row in range(top, top + merge):
                for column in range(left, left + merge):
                    inside = row < side and column < side
                    token.extend(features[row * side + column] if inside else [0.0] * hidden)
            tokens.append(token)
    return np.array(tokens)


def mlp(token: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    """LayerNorm, Linear, GELU by the error function, Linear; without the norm's weights no norm.

    Where the first layer makes twice what the second takes, its first half is scaled by the second half's SiLU.
    """
    if "norm.weight" in w:
        token = (token - token.mean()) / math.sqrt(token.var() + 1e-5) * w["norm.weight"] + w["norm.bias"]
    token, size = w["linear_fc1.weight"] @ token + w["linear_fc1.bias"], w["linear_fc2.weight"].shape[1]
    if len(token) == 2 * size:
        token = np.array([x * gate / (1 + math.exp(-gate)) for x, gate in zip(token[:size], token[size:])])
    else:
        token = np.array([x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in token])
    return w["linear_fc2.weight"] @ token + w["linear_fc2.bias"]


@pytest.mark.parametrize("side, merge", [(2, 2), (4, 2), (5, 2), (27, 2), (7, 3), (3, 1)])
def test_fold(side, merge):
    features = torch.arange(2 * side * side * 3, dtype=torch.float32).view(2, side * side, 3) + 1
    expected = np.stack([fold(one, side, merge) for one in features.numpy()])
    np.testing.assert_array_equal(fold_tokens(features, side, merge).numpy(), expected)


def test_27_patches_a_side_become_196_tokens():
    folded = fold_tokens(torch.ones(1, 27 * 27, 2), 27, 2)
    assert folded.shape == (1, 196, 8)
    grid = folded.view(14, 14, 2, 2, 2)  # token row and column, then row and column inside the token
    assert grid[:13, :13].eq(1).all()
    assert grid[13, :, 1].eq(0).all() and grid[:, 13, :, 1].eq(0).all()
    assert grid.sum() == 27 * 27 * 2


def shapes(vision: int, language: int, **others) -> ModelConfig:
    return ModelConfig(vision=VisionConfig(hidden_size=vision), language=LanguageConfig(hidden_size=language), **others)


@pytest.mark.parametrize("tile", [56, 70], ids=["even grid", "odd grid"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("activation", Activation)
def test_projector(tile, norm, activation):
    model = shapes(6, 10, geometry=GeometryConfig(tile=tile), projector=ProjectorConfig(norm, activation))
    geometry = geometry_of(model)
    projector = randomize(Projector(model, torch.float32), seed=1)
    side = geometry.patches_per_side
    features = torch.randn(2, side * side, 6, generator=torch.Generator().manual_seed(2))
    weights = {name: p.detach().double().numpy() for name, p in projector.named_parameters()}
    expected = [[mlp(t, weights) for t in fold(one.double().numpy(), side, 2)] for one in features]
    actual = projector(features)
    assert actual.shape == (2, geometry.tokens_per_tile, 10)
    np.testing.assert_allclose(actual.detach().numpy(), np.array(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("hidden", [2048, 2560])
def test_parameter_count(hidden):
    with torch.device("meta"):
        projector = Projector(shapes(1152, hidden), torch.float32)
    assert sum(p.numel() for p in projector.parameters()) == hidden**2 + 4610 * hidden + 9216
