"""Queries, keys and values out of one projection, turned by RoPE and laid out for the attention kernel, in one pass.

Triton; import it only on a GPU. Transformer Engine's kernel for this takes each angle's sine and cosine once a head
and reaches a third of the memory's bandwidth; here a program takes them once for all heads of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _split_and_turn(
    mixed,
    query,
    key,
    value,
    angles,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,  # of a group
    HALF: tl.constexpr,  # half a head's channels
    HEADS: tl.constexpr,  # GROUPS * (QUERIES + 2), rounded up to a power of two, as the next
    CHANNELS: tl.constexpr,  # HALF
    BACK: tl.constexpr,  # gradients: from query, key, value to mixed, turned the other way
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, CHANNELS)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    group, place = head // (QUERIES + 2), head % (QUERIES + 2)
    inside = (head < GROUPS * (QUERIES + 2)) & (channel < HALF)
    is_query = inside & (place < QUERIES)
    is_key = inside & (place == QUERIES)
    is_value = inside & (place == QUERIES + 1)

    angle = tl.load(angles + row * 2 * HALF + channel, channel < HALF, 0.0)
    cos, sin = tl.cos(angle), tl.sin(angle)
    if BACK:
        sin = -sin
    cos, sin = tl.where(is_value, 1.0, cos), tl.where(is_value, 0.0, sin)

    here = mixed + (row * GROUPS * (QUERIES + 2) + head) * 2 * HALF + channel
    q = query + ((row * GROUPS + group) * QUERIES + place) * 2 * HALF + channel
    k = key + (row * GROUPS + group) * 2 * HALF + channel
    v = value + (row * GROUPS + group) * 2 * HALF + channel
    if BACK:
        first = tl.load(q, is_query, 0.0) + tl.load(k, is_key, 0.0) + tl.load(v, is_value, 0.0)
        second = tl.load(q + HALF, is_query, 0.0) + tl.load(k + HALF, is_key, 0.0) + tl.load(v + HALF, is_value, 0.0)
    else:
        first, second = tl.load(here, inside, 0.0), tl.load(here + HALF, inside, 0.0)
    first, second = first.to(tl.float32), second.to(tl.float32)
    turned, other = first * cos - second * sin, second * cos + first * sin
    if BACK:
        tl.store(here, turned, inside)
        tl.store(here + HALF, other, inside)
    else:
        tl.store(q, turned, is_query)
        tl.store(q + HALF, other, is_query)
        tl.store(k, turned, is_key)
        tl.store(k + HALF, other, is_key)
        tl.store(v, turned, is_value)
        tl.store(v + HALF, other, is_value)


class _SplitRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed: Tensor, angles: Tensor, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        rows, groups, width = mixed.shape
        head = width // (queries + 2)
        query = mixed.new_empty(rows, groups * queries, head)
        key, value = mixed.new_empty(rows, groups, head), mixed.new_empty(rows, groups, head)
        _launch(mixed, query, key, value, angles, back=False)
        ctx.save_for_backward(angles)
        return query, key, value

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        query, key, value = (grad.contiguous() for grad in grads)
        rows, groups, head = key.shape
        mixed = key.new_empty(rows, groups, (query.size(1) // groups + 2) * head)
        _launch(mixed, query, key, value, *ctx.saved_tensors, back=True)
        return mixed, None, None


def _launch(mixed: Tensor, query: Tensor, key: Tensor, value: Tensor, angles: Tensor, back: bool) -> None:
    rows, groups, head = key.shape
    queries = query.size(1) // groups
    padded = (triton.next_power_of_2(n) for n in (groups * (queries + 2), head // 2))
    _split_and_turn[(rows,)](mixed, query, key, value, angles, groups, queries, head // 2, *padded, back)


def split_rotary(mixed: Tensor, angles: Tensor, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a projection into queries, keys and values and turn the first two (RoPE, arXiv 2104.09864).

    Args:
        mixed: [rows, groups, (queries + 2) * d]: a group's queries, its key, its value; contiguous, on a GPU.
        angles: fp32 [rows, d], an angle for each row and channel; the halves of a row are the same. Contiguous.
        queries: query heads of a group.

    Returns:
        query [rows, groups * queries, d], key and value [rows, groups, d], in ``mixed``'s dtype; turned in fp32.
    """
    return _SplitRotary.apply(mixed, angles, queries)
