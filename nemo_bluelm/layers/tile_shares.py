"""The ViT's tiles over the ranks of a pipeline stage: who works on which, and the features of all on each."""

from collections.abc import Sequence
from itertools import chain

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_bluelm.layers.context import on_device

Shares = tuple[tuple[int, ...], ...]  # by rank of the tensor and context group, the places of its tiles in the row


def balance(costs: Sequence[float], ranks: int) -> Shares:
    """Split work so that the rank with the most has as little as a simple rule can give it.

    The dearest piece left goes to the rank with the least so far (longest processing time first, Graham 1969: at most
    4/3 of the optimum). Pieces of one cost are dealt evenly, to within one.

    Args:
        costs: of each piece, in any unit.
        ranks: 1 or more; those beyond the pieces get none.

    Returns:
        By rank, the pieces that it has, ascending.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        least = min(range(ranks), key=lambda rank: (loads[rank], rank))
        shares[least].append(piece)
        loads[least] += costs[piece]
    return tuple(tuple(sorted(share)) for share in shares)


def gather_tiles(features: Tensor, shares: Shares) -> Tensor:
    """The features of all tiles of the row, in order, from those of each rank; differentiable.

    Every tensor-parallel rank must give the same gradient back, and every context-parallel rank the gradient of its own
    part of the row. Each rank then gets the gradient of its tiles once and whole, so the weights that made the features
    have gradients to be summed over tensor- as well as context- and data-parallel ranks.

    Args:
        features: [tiles of this rank, ...].
        shares: of all ranks of the tensor and context group, the same on each.

    Returns:
        [tiles, ...].
    """
    return _Gather.apply(features, shares)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, shares: Shares) -> Tensor:
        ctx.shares = shares
        group = parallel_state.get_tensor_and_context_parallel_group()
        most = max(map(len, shares))  # collectives want equal parts
        mine = features.new_zeros(most, *features.shape[1:])
        mine[: features.size(0)] = features
        gathered = features.new_empty(len(shares) * most, *features.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, mine, group=group)
        places = {tile: rank * most + i for rank, share in enumerate(shares) for i, tile in enumerate(share)}
        order = [places[tile] for tile in range(len(places))]
        return gathered.index_select(0, on_device(order, torch.int64, features.device))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ranks = torch.distributed.get_process_group_ranks(parallel_state.get_tensor_and_context_parallel_group())
        context = parallel_state.get_context_parallel_group()
        # Context-parallel ranks hold gradients of other rows; tensor-parallel ranks hold copies: one is enough.
        wanted = [ctx.shares[ranks.index(rank)] for rank in torch.distributed.get_process_group_ranks(context)]
        most = max(map(len, wanted))
        filled = [share + (0,) * (most - len(share)) for share in wanted]
        parts = grad.index_select(0, on_device(list(chain(*filled)), torch.int64, grad.device))
        if len(wanted) > 1 and most:
            mine = torch.empty_like(parts[:most])
            torch.distributed.reduce_scatter_tensor(mine, parts, group=context)
            parts = mine
        return parts[: len(wanted[context.rank()])], None
