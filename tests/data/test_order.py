"""The order of a source: a bijection at any size, frozen, with factors that come out exactly."""

from collections import Counter

import numpy as np
import pytest

from nemo_bluelm.data.order import Permutation, SourceOrder


@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 1000, 65_536, 100_001])
def test_permutation_hits_every_element_once(size):
    assert sorted(Permutation(size, 1, "x", 0)(np.arange(size)).tolist()) == list(range(size))


def test_permutation_is_computed_in_place():
    whole = Permutation(10_000, 7)(np.arange(10_000))
    assert Permutation(10_000, 7)(np.array([9_999, 4, 4])).tolist() == whole[[9_999, 4, 4]].tolist()
    far = Permutation(10**12, 7)(np.array([0, 10**12 - 1]))
    assert ((0 <= far) & (far < 10**12)).all()


def test_permutations_look_random():
    """Over many keys each element comes to each place about equally often (chi-square, 49 degrees of freedom)."""
    counts = np.zeros((8, 8))
    for key in range(4000):
        counts[np.arange(8), Permutation(8, key)(np.arange(8))] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 100  # beyond the 99.99th percentile
    order = Permutation(100_000, 3)(np.arange(100_000))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02


def test_order_is_frozen():
    """These values must never change: a run resumed after an upgrade depends on them."""
    assert SourceOrder(1234, "digits", np.ones(8)).draw(0, 8).tolist() == [2, 7, 4, 6, 1, 0, 5, 3]
    assert SourceOrder(1234, "digits", np.ones(8)).draw(8, 8).tolist() != [2, 7, 4, 6, 1, 0, 5, 3]


def test_draw_stops_at_the_end_of_an_epoch():
    order = SourceOrder(0, "x", np.ones(10))
    assert len(order.draw(7, 10)) == 3
    assert order.draw(7, 10).tolist() == order.draw(0, 10)[7:].tolist()


def test_factors_are_exact_and_the_extra_turn_goes_round():
    factors = np.repeat([0.0, 0.25, 1.0, 2.5], [5, 40, 100, 20])
    order = SourceOrder(0, "x", factors)
    assert order.epoch_length == 10 + 100 + 50
    one = Counter(order.draw(0, 160).tolist())
    assert {one[i] for i in range(45, 145)} == {1}
    assert sum(one[i] for i in range(5, 45)) == 10
    assert {one[i] for i in range(145, 165)} == {2, 3}
    four = Counter(i for epoch in range(4) for i in order.draw(epoch * 160, 160).tolist())
    assert {four[i] for i in range(5)} == {0}
    assert {four[i] for i in range(5, 45)} == {1}
    assert {four[i] for i in range(145, 165)} == {10}


def test_a_lone_sample_of_a_small_factor_comes_some_day():
    order = SourceOrder(0, "x", np.array([0.25]))
    assert order.epoch_length == 1 and order.draw(0, 1).tolist() == [0]
