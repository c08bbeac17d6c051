"""How a pack is cut over context-parallel ranks: by definition, without loss, with equal work."""

import random
from itertools import accumulate, pairwise

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

from nemo_bluelm.layers.context import context_indices, context_rows, document_order, visible_keys

CPU = torch.device("cpu")


def packs(count):
    """(context size, bounds) of random packs."""
    rng = random.Random(0)
    for _ in range(count):
        size = rng.randint(1, 8)
        lengths = [2 * size * rng.randint(1, 9) for _ in range(rng.randint(1, 6))]
        yield size, tuple(accumulate(lengths, initial=0))


CASES = list(packs(40))


@pytest.mark.parametrize("size, bounds", CASES)
def test_ranks_share_all_rows_and_all_work(size, bounds):
    ranks = [context_indices(bounds, size, rank) for rank in range(size)]
    assert torch.equal(torch.cat(ranks).sort().values, torch.arange(bounds[-1]))
    assert {len(rows) for rows in ranks} == {bounds[-1] // size}
    visible = torch.cat([torch.arange(end - start) for start, end in pairwise(bounds)]) + 1  # keys that a query sees
    assert len({int(visible[rows].sum()) for rows in ranks}) == 1


@pytest.mark.parametrize("size, bounds", CASES)
def test_definition(size, bounds):
    for rank in range(size):
        expected = []
        for start, end in pairwise(bounds):
            chunks = torch.arange(start, end).chunk(2 * size)
            expected += [*chunks[rank].tolist(), *chunks[-1 - rank].tolist()]
        rows = context_indices(bounds, size, rank)
        assert rows.dtype == torch.int64 and rows.tolist() == expected


@pytest.mark.parametrize("size, bounds", [case for case in CASES if case[0] > 1])
def test_order_is_that_of_megatrons_rope(size, bounds):
    for rank in range(size):
        positions = [
            _get_thd_freqs_on_this_cp_rank(rank, size, torch.empty((end - start) // size), torch.arange(start, end))
            for start, end in pairwise(bounds)
        ]
        assert torch.equal(context_indices(bounds, size, rank), torch.cat(positions))


@pytest.mark.parametrize("size, bounds", CASES)
def test_gathered_rows_and_the_packs_go_over_into_each_other(size, bounds):
    to_pack, to_ranks = document_order(bounds, size, CPU)
    gathered = torch.cat([context_indices(bounds, size, rank) for rank in range(size)])
    assert torch.equal(gathered[to_pack], torch.arange(bounds[-1]))
    assert torch.equal(torch.arange(bounds[-1])[to_ranks], gathered)


@pytest.mark.parametrize("size, bounds", CASES)
def test_visible_keys_are_those_from_the_documents_start_to_the_query(size, bounds):
    gathered = torch.cat([context_indices(bounds, size, rank) for rank in range(size)])
    for rank in range(size):
        rows, spans = visible_keys(bounds, size, rank, CPU)
        queries, keys = context_indices(bounds, size, rank), gathered[rows]
        assert spans.queries[-1] == len(queries) and spans.keys[-1] == len(keys)
        for (q, q_end), (k, k_end) in zip(pairwise(spans.queries), pairwise(spans.keys)):
            start = max(bound for bound in bounds if bound <= queries[q])
            assert keys[k:k_end].tolist() == list(range(start, int(queries[q_end - 1]) + 1))
        assert spans.max_kv == max(end - start for start, end in pairwise(spans.keys))
        assert spans.cu_seqlens_kv.tolist() == list(spans.keys) and spans.cu_seqlens_q.dtype == torch.int32


@pytest.mark.usefixtures("world")
def test_one_rank_holds_the_whole_row():
    row = torch.arange(8)[None]
    assert context_rows(row, (0, 8)) is row
