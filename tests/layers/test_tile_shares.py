"""Which rank works on which tile: nothing lost, nothing twice, even where it can be."""

import random

import pytest

from nemo_bluelm.layers.tile_shares import balance


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tiles", [0, 1, 2, 5, 16, 17, 64])
def test_equal_tiles_are_dealt_evenly(tiles, ranks):
    shares = balance([1.0] * tiles, ranks)
    assert sorted(tile for share in shares for tile in share) == list(range(tiles))
    assert len(shares) == ranks and max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(list(share) == sorted(share) for share in shares)


def test_dear_pieces_first():
    assert balance([1, 1, 1, 1, 4], 2) == ((4,), (0, 1, 2, 3))


def test_no_rank_has_more_than_its_part_and_one_piece():
    """Graham's bound for dealing to the least loaded."""
    rng = random.Random(0)
    for _ in range(200):
        costs, ranks = [rng.uniform(0.1, 10) for _ in range(rng.randint(1, 30))], rng.randint(1, 6)
        shares = balance(costs, ranks)
        assert sorted(piece for share in shares for piece in share) == list(range(len(costs)))
        loads = [sum(costs[piece] for piece in share) for share in shares]
        assert max(loads) <= sum(costs) / ranks + max(costs) * (1 - 1 / ranks) + 1e-9
