"""How a pack is cut over context-parallel ranks: by definition, without loss, with equal work."""

import random

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

from nemo_bluelm.layers.context import context_indices, context_rows


def packs(count):
    """(context size, bounds) of random packs."""
    rng = random.Random(0)
    for _ in range(count):
        size = rng.randint(1, 8)
        lengths = [2 * size * rng.randint(1, 9) for _ in range(rng.randint(1, 6))]
        yield size, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


CASES = list(packs(40))


@pytest.mark.parametrize("size, bounds", CASES)
def test_ranks_share_all_rows_and_all_work(size, bounds):
    ranks = [context_indices(bounds, size, rank) for rank in range(size)]
    assert torch.equal(torch.cat(ranks).sort().values, torch.arange(int(bounds[-1])))
    assert {len(rows) for rows in ranks} == {int(bounds[-1]) // size}
    starts = torch.repeat_interleave(bounds[:-1], bounds.diff())
    visible = torch.arange(int(bounds[-1])) - starts + 1  # keys that a row's query sees
    assert len({int(visible[rows].sum()) for rows in ranks}) == 1


@pytest.mark.parametrize("size, bounds", CASES)
def test_definition(size, bounds):
    for rank in range(size):
        expected = []
        for start, end in zip(bounds.tolist(), bounds.tolist()[1:]):
            chunks = torch.arange(start, end).chunk(2 * size)
            expected += [*chunks[rank].tolist(), *chunks[-1 - rank].tolist()]
        rows = context_indices(bounds, size, rank)
        assert rows.dtype == torch.int64 and rows.tolist() == expected


@pytest.mark.parametrize("size, bounds", [case for case in CASES if case[0] > 1])
def test_order_is_that_of_megatrons_rope(size, bounds):
    for rank in range(size):
        positions = [
            _get_thd_freqs_on_this_cp_rank(rank, size, torch.empty((end - start) // size), torch.arange(start, end))
            for start, end in zip(bounds.tolist(), bounds.tolist()[1:])
        ]
        assert torch.equal(context_indices(bounds, size, rank), torch.cat(positions))


@pytest.mark.usefixtures("world")
def test_one_rank_holds_the_whole_row():
    row = torch.arange(8)[None]
    assert context_rows(row, torch.tensor([0, 8])) is row
