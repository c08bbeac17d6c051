"""Transformer Engine's cross-entropy, whose backward pass leaves alone what is to be multiplied by one.

Triton; import it only on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from transformer_engine.pytorch.cross_entropy import CrossEntropyFunction


@triton.jit
def _scale_rows(rows, scales, stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scales + row)
    if scale != 1.0:
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            here = rows + row * stride + column
            tl.store(here, tl.load(here, column < columns) * scale, column < columns)


class _CrossEntropy(CrossEntropyFunction):
    """The forward pass has made the logits' gradient in their place. What it is multiplied by is a target's weight, so
    mostly one: each row's program looks first, where TE's multiplies every logit (9 ms of a 4K step on an H100)."""

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        _scale_rows[(rows.size(0),)](rows, grad.flatten().contiguous(), rows.stride(0), rows.size(1), BLOCK=8192)
        return gradient, *[None] * 6


def cross_entropy(logits: Tensor, labels: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Cross-entropy of every row, in fp32. The logits are overwritten.

    Args:
        logits: [S, 1, V / group size], on a GPU.
        labels: int64 [1, S].
        group: the ranks that the vocabulary is split over.

    Returns:
        fp32 [1, S].
    """
    return _CrossEntropy.apply(logits, labels, 0.0, False, group).transpose(0, 1)
