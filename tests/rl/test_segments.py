"""Sums over sequences whose tokens lie anywhere."""

import torch

from nemo_bluelm.rl.segments import Segments


def test_lengths_are_laid_one_after_another():
    segments = Segments.of_lengths([2, 0, 3])
    assert (segments.ids.tolist(), segments.count) == ([0, 0, 2, 2, 2], 3)
    assert segments.spread(torch.tensor([5, 6, 7])).tolist() == [5, 5, 7, 7, 7]


def test_sums_and_means():
    """Nothing of a masked token is looked at; a sequence without a token, or with all of them masked, has mean 0."""
    segments = Segments(torch.tensor([1, 0, 1, 3, 0]), 4)
    values = torch.tensor([1.0, torch.nan, 2.0, torch.inf, 5.0], requires_grad=True)
    means = segments.mean(values, torch.tensor([1, 0, 1, 0, 1]))
    assert means.tolist() == [5.0, 1.5, 0.0, 0.0] and not means.requires_grad
    assert segments.sum(torch.ones(5)).tolist() == [2, 2, 0, 1]


def test_many_small_values_beside_a_large_one():
    """In fp32 the ones would vanish, and the result would depend on the order."""
    values = torch.ones(1001)
    for place in (0, 500, 1000):
        values[:] = 1.0
        values[place] = 2.0**24
        assert Segments.of_lengths([1001]).sum(values).item() == 2**24 + 1000
