"""How a pack is cut over context-parallel ranks."""

import torch
from megatron.core import parallel_state
from torch import Tensor


def context_indices(cu_seqlens_padded: Tensor, size: int, rank: int) -> Tensor:
    """Rows of a pack that one context-parallel rank holds.

    Every document is cut in ``2 * size`` equal chunks and a rank takes chunks ``rank`` and ``2 * size - 1 - rank``,
    so that all ranks do the same causal work. It is the order that Megatron-Core's packed RoPE and Transformer
    Engine's ``thd_get_partitioned_indices`` use.

    Args:
        cu_seqlens_padded: int [documents + 1]; every document length must be a multiple of ``2 * size``.

    Returns:
        int64 [S / size], on the device of ``cu_seqlens_padded``.
    """
    rows = []
    bounds = cu_seqlens_padded.tolist()
    for start, end in zip(bounds, bounds[1:]):
        chunk = (end - start) // (2 * size)
        for part in (rank, 2 * size - 1 - rank):
            rows.append(torch.arange(start + part * chunk, start + (part + 1) * chunk))
    return torch.cat(rows).to(cu_seqlens_padded.device)


def context_rows(row: Tensor, cu_seqlens_padded: Tensor) -> Tensor:
    """This context-parallel rank's part of a [1, S, ...] tensor."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return row
    return row.index_select(1, context_indices(cu_seqlens_padded, size, parallel_state.get_context_parallel_rank()))
