"""Rollout correction: weights by hand, and the tokens that have none."""

import math

import pytest
import torch

from nemo_bluelm.errors import UserError
from nemo_bluelm.rl.correction import rollout_correction
from nemo_bluelm.rl.segments import Segments

RATIOS = [0.25, 1.0, 2.0, 8.0, 0.5, 2.0]  # of training over rollout; two responses of three tokens
SEGMENTS = Segments.of_lengths([3, 3])


def correct(kind, mask=(1,) * 6, **options):
    old = torch.full((6,), -1.0, dtype=torch.float64, requires_grad=True)
    rollout = old.detach() - torch.tensor(RATIOS).double().log()
    return rollout_correction(old, rollout, torch.tensor(mask), kind, segments=SEGMENTS, **options)


@pytest.mark.parametrize(
    "kind, options, weights, outside",
    [
        ("none", {}, [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0]),
        ("tis", {}, [0.25, 1, 2, 2, 0.5, 2], [0, 0, 0, 1, 0, 0]),
        ("tis", {"lower": 0.4, "upper": 3.0}, [0.4, 1, 2, 3, 0.5, 2], [1, 0, 0, 1, 0, 0]),
        ("icepop", {"lower": 1.0, "upper": 1.5}, [0, 1, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1]),  # the bounds belong to it
        ("icepop", {"lower": 0.9, "upper": 1.0}, [0, 1, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1]),
        ("icepop", {"lower": 0.4, "upper": 3.0}, [0, 1, 2, 0, 0.5, 2], [1, 0, 0, 1, 0, 0]),
        ("seq_mask_tis", {"lower": 0.4, "upper": 1.9}, [0.25, 1, 2, 0, 0, 0], [0, 0, 0, 1, 1, 1]),
        ("seq_mask_tis", {"lower": 0.9, "upper": 2.1}, [0, 0, 0, 8, 0.5, 2], [1, 1, 1, 0, 0, 0]),
    ],
)
def test_weights(kind, options, weights, outside):
    """The geometric means are 0.5 ** (1 / 3) = 0.79 and 2."""
    result = correct(kind, **options)
    torch.testing.assert_close(result.weights, torch.tensor(weights).double())
    assert result.out_of_bounds.int().tolist() == outside
    assert not result.weights.requires_grad


def test_masked_tokens_neither_weigh_nor_count():
    """Without the token of ratio 8 the second response's mean is 1."""
    mask = (1, 1, 0, 0, 1, 1)
    result = correct("seq_mask_tis", mask, lower=0.9, upper=1.1)
    torch.testing.assert_close(result.weights, torch.tensor([0, 0, 0, 0, 0.5, 2]).double())
    assert result.out_of_bounds.tolist() == [True] * 2 + [False] * 4
    assert correct("none", mask).weights.tolist() == [1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("kind", ["tis", "icepop", "seq_mask_tis"])
def test_unknown_and_far_away(kind):
    """Where the engine tells no log-probability the weight is 1; where it is far off, the weight is finite."""
    old = torch.tensor([-1.0, -1.0, -900.0])
    rollout = torch.tensor([torch.nan, -1.0, -1.0])
    mask = torch.ones(3)
    result = rollout_correction(old, rollout, mask, kind, segments=Segments.of_lengths([1, 1, 1]))
    assert result.weights[:2].tolist() == [1, 1]
    assert result.weights[2].item() == pytest.approx(0, abs=1e-8)
    near, far = torch.zeros(1), torch.full((1,), -900.0)
    result = rollout_correction(near, far, torch.ones(1), kind, segments=Segments.of_lengths([1]))
    assert result.weights.item() == {"tis": 2, "icepop": 0, "seq_mask_tis": 0}[kind]


def test_far_off_tokens_of_a_kept_response():
    """Their geometric mean is 1; the weights are finite all the same."""
    old, rollout = torch.tensor([-1.0, -900.0]), torch.tensor([-900.0, -1.0])
    result = rollout_correction(old, rollout, torch.ones(2), "seq_mask_tis", segments=Segments.of_lengths([2]))
    assert result.weights.tolist() == pytest.approx([math.exp(20), math.exp(-20)])


def test_mistakes():
    with pytest.raises(UserError, match="'mis' is unknown"):
        correct("mis")
    with pytest.raises(UserError, match="0 <= lower < upper"):
        correct("tis", lower=2.0, upper=0.5)
    with pytest.raises(ValueError, match="give segments"):
        rollout_correction(torch.zeros(1), torch.zeros(1), torch.ones(1), "seq_mask_tis")
