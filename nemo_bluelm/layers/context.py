"""How a pack is cut over context-parallel ranks. All of it is known on the host: nothing here waits for a GPU."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from torch import Tensor

Bounds = tuple[int, ...]  # where the segments of a pack begin, and S


def context_chunks(bounds: Sequence[int], size: int, rank: int) -> list[tuple[int, int, int]]:
    """The pieces of a pack that one context-parallel rank holds: (start of the document, start, end) in rows.

    Every document is cut in ``2 * size`` equal chunks and a rank takes chunks ``rank`` and ``2 * size - 1 - rank``,
    so that all ranks do the same causal work. It is the order that Megatron-Core's packed RoPE and Transformer
    Engine's ``thd_get_partitioned_indices`` use.

    Args:
        bounds: n + 1 offsets of the documents; every length must be a multiple of ``2 * size``.
    """
    chunks = []
    for start, end in pairwise(bounds):
        length = (end - start) // (2 * size)
        for part in (rank, 2 * size - 1 - rank):
            chunks.append((start, start + part * length, start + (part + 1) * length))
    return chunks


def context_indices(bounds: Sequence[int], size: int, rank: int) -> Tensor:
    """Rows of a pack that one context-parallel rank holds: int64 [S / size] on the host. See :func:`context_chunks`."""
    return torch.cat([torch.arange(start, end) for _, start, end in context_chunks(bounds, size, rank)])


def context_rows(row: Tensor, bounds: Bounds) -> Tensor:
    """This context-parallel rank's part of a [1, S, ...] tensor.

    Args:
        bounds: as :attr:`nemo_bluelm.data.packs.PackedBatch.bounds`.
    """
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return row
    return row.index_select(1, _rows(bounds, size, parallel_state.get_context_parallel_rank(), row.device))


class Spans(NamedTuple):
    """Which queries see which keys: pairs of segments, the last query of a pair sees its last key.

    Attributes:
        queries, keys: n + 1 offsets of the segments, on the host.
        cu_seqlens_q, cu_seqlens_kv: the same on the device, int32 [n + 1].
        max_q, max_kv: longest segments.
    """

    queries: Bounds
    keys: Bounds
    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    max_q: int
    max_kv: int

    @classmethod
    def of(cls, queries: Bounds, keys: Bounds, device: torch.device) -> "Spans":
        longest = [max(end - start for start, end in pairwise(bounds)) for bounds in (queries, keys)]
        return cls(queries, keys, *(on_device(bounds, torch.int32, device) for bounds in (queries, keys)), *longest)


# A step asks for the same few packs in every layer and again in recomputation.
_remember = lru_cache(maxsize=16)


@_remember
def whole_documents(bounds: Bounds, device: torch.device) -> Spans:
    """Each document's queries see the keys of their own document."""
    return Spans.of(bounds, bounds, device)


@_remember
def document_order(bounds: Bounds, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Between the rows of all ranks one after the other (gathered) and the rows of the pack, int64 [S] each.

    Returns:
        ``gathered.index_select(0, first)`` is the pack, ``pack.index_select(0, second)`` is what was gathered.
    """
    ranks_first = torch.cat([context_indices(bounds, size, rank) for rank in range(size)])
    return on_device(ranks_first.argsort(), torch.int64, device), on_device(ranks_first, torch.int64, device)


@_remember
def visible_keys(bounds: Bounds, size: int, rank: int, device: torch.device) -> tuple[Tensor, Spans]:
    """What the queries of one rank see of the gathered keys.

    Returns:
        int64 rows of the gathered keys, those of each chunk in the order of its document from its first row to the
        chunk's last, and the spans of the rank's queries over them.
    """
    place = torch.cat([context_indices(bounds, size, other) for other in range(size)]).argsort()
    rows, queries, keys = [], [0], [0]
    for document, start, end in context_chunks(bounds, size, rank):
        rows.append(place[document:end])
        queries.append(queries[-1] + end - start)
        keys.append(keys[-1] + end - document)
    return on_device(torch.cat(rows), torch.int64, device), Spans.of(tuple(queries), tuple(keys), device)


def on_device(values: Sequence[int] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Integers of the host on a device; a GPU fetches them without making the host wait."""
    with torch.inference_mode(False):  # generation may ask first, and training then finds it here
        host = torch.as_tensor(values, dtype=dtype)
        return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


@_remember
def _rows(bounds: Bounds, size: int, rank: int, device: torch.device) -> Tensor:
    return on_device(context_indices(bounds, size, rank), torch.int64, device)
