"""PackedAttention against a dense softmax written out: packs, grouped queries, full and context-parallel attention."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_world import assert_near

from nemo_bluelm.layers import attention
from nemo_bluelm.layers.attention import PackedAttention, PackParams
from nemo_bluelm.layers.context import context_indices

pytestmark = pytest.mark.usefixtures("world")

HEAD = 8


def dense(query, key, value, allowed, scale=None):
    """[q, heads, d] x [k, groups, d] -> [q, heads, d] by the definition, head by head, in fp64."""
    repeat = query.size(1) // key.size(1)
    outputs = []
    for head in range(query.size(1)):
        q, k, v = query[:, head].double(), key[:, head // repeat].double(), value[:, head // repeat].double()
        scores = q @ k.T * (scale or 1 / math.sqrt(query.size(2)))
        exponents = (scores - scores.max()).exp() * allowed
        outputs.append(exponents / exponents.sum(1, keepdim=True) @ v)
    return torch.stack(outputs, 1)


def causal_in_documents(lengths):
    """allowed[i, j]: i and j lie in one document and j is not after i."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(len(document))
    return (document[:, None] == document) & (position[:, None] >= position)


def tensors(rows, heads, groups, requires_grad=False):
    generator = torch.Generator().manual_seed(rows)
    shapes = (rows, heads, HEAD), (rows, groups, HEAD), (rows, groups, HEAD)
    return [torch.randn(shape, generator=generator).requires_grad_(requires_grad) for shape in shapes]


def core_attention(heads, groups, mask, softmax_scale=None, cp_comm_type=None):
    config = TransformerConfig(
        num_layers=1, hidden_size=HEAD * heads, num_attention_heads=heads, num_query_groups=groups
    )
    return PackedAttention(config, 1, mask, "self", softmax_scale=softmax_scale, cp_comm_type=cp_comm_type)


def pack_of(lengths):
    return PackParams(qkv_format="thd", bounds=tuple(accumulate(lengths, initial=0)))


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", [[16], [3, 1, 12], [1, 1, 1], [7, 20]])
def test_causal_inside_documents(lengths, heads, groups):
    query, key, value = tensors(sum(lengths), heads, groups, requires_grad=True)
    layer = core_attention(heads, groups, AttnMaskType.causal)
    out = layer(query, key, value, packed_seq_params=pack_of(lengths))
    expected = dense(query, key, value, causal_in_documents(lengths))
    assert_near(out, expected, 1e-5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    inputs = query, key, value
    for ours, theirs in zip(
        torch.autograd.grad((out * weights).sum(), inputs), torch.autograd.grad((expected * weights).sum(), inputs)
    ):
        assert_near(ours, theirs, 1e-5)


@pytest.mark.parametrize("mask", [AttnMaskType.no_mask, AttnMaskType.causal])
def test_whole_sequences_without_a_pack(mask):
    query, key, value = (torch.stack([x, x.flip(0), 2 * x], 1) for x in tensors(9, 4, 4))  # [s, b, heads, d]
    out = core_attention(4, 4, mask)(query, key, value)
    assert out.shape == (9, 3, 4 * HEAD)
    allowed = torch.ones(9, 9, dtype=torch.bool) if mask is AttnMaskType.no_mask else causal_in_documents([9])
    for sample in range(3):
        expected = dense(query[:, sample], key[:, sample], value[:, sample], allowed)
        assert_near(out[:, sample], expected.flatten(1), 1e-5)


def test_softmax_scale():
    query, key, value = tensors(6, 2, 2)
    out = core_attention(2, 2, AttnMaskType.causal, softmax_scale=0.9)(
        query, key, value, packed_seq_params=pack_of([6])
    )
    assert_near(out, dense(query, key, value, causal_in_documents([6]), scale=0.9), 1e-5)


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 9), (4, 12), (5, 6), (8, 8)])
def test_the_last_query_sees_the_last_key(queries, keys):
    query, key, value = tensors(keys, 4, 2)
    query = query[keys - queries :]
    allowed = causal_in_documents([keys])[keys - queries :]
    out = core_attention(4, 2, AttnMaskType.causal)._attend_rows(query, key, value)
    assert_near(out, dense(query, key, value, allowed), 1e-5)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_gather_ranks_together_give_the_whole(size, monkeypatch):
    """Every rank in turn, with the gather of keys and values played by the test."""
    lengths = [2 * size, 10 * size, 4 * size]
    query, key, value = tensors(sum(lengths), 4, 2)
    pack = pack_of(lengths)
    rows = [context_indices(pack.bounds, size, rank) for rank in range(size)]
    gathered = torch.cat([torch.stack((key[r], value[r]), dim=1) for r in rows])
    monkeypatch.setattr(attention, "gather_from_sequence_parallel_region", lambda both, group: gathered)
    layer = core_attention(4, 2, AttnMaskType.causal)
    out = torch.full_like(query, torch.nan)
    for rank in range(size):
        layer.cp_group = SimpleNamespace(size=lambda: size, rank=lambda rank=rank: rank)
        mine = rows[rank]
        out[mine] = layer(query[mine], key[mine], value[mine], packed_seq_params=pack)
    assert_near(out, dense(query, key, value, causal_in_documents(lengths)), 1e-5)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_to_all_ranks_together_give_the_whole(size, monkeypatch):
    """The ranks go through their forward passes in step, with the two exchanges played by the test."""
    lengths, heads, groups = [2 * size, 10 * size, 4 * size], 4 * size, 2 * size
    query, key, value = tensors(sum(lengths), heads, groups)
    pack = pack_of(lengths)
    rows = [context_indices(pack.bounds, size, rank) for rank in range(size)]
    exchange = Exchange(size)
    monkeypatch.setattr(attention, "all_to_all", exchange)
    layers = [core_attention(heads, groups, AttnMaskType.causal, cp_comm_type="a2a") for _ in range(size)]
    for rank, layer in enumerate(layers):
        layer._over_ranks = layer._all_to_all
        layer.cp_group = SimpleNamespace(size=lambda: size, rank=lambda rank=rank: rank)
    with ThreadPoolExecutor(size) as pool:
        parts = pool.map(lambda layer, r: layer(query[r], key[r], value[r], packed_seq_params=pack), layers, rows)
        out = torch.full_like(query, torch.nan)
        for mine, part in zip(rows, parts):
            out[mine] = part
    assert_near(out, dense(query, key, value, causal_in_documents(lengths)), 1e-5)


class Exchange:
    """An all-to-all between threads."""

    def __init__(self, size):
        self.size, self.sent, self.barrier = size, {}, threading.Barrier(size, timeout=20)

    def __call__(self, group, tensor):
        self.sent[group.rank()] = tensor.chunk(self.size)
        self.barrier.wait()
        received = torch.cat([self.sent[rank][group.rank()] for rank in range(self.size)])
        self.barrier.wait()
        return received


def test_a_communication_that_is_not_there_is_refused(monkeypatch):
    groups = SimpleNamespace(cp=SimpleNamespace(size=lambda: 2))
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
    with pytest.raises(ValueError, match="'p2p' is none of all_gather, a2a"):
        PackedAttention(config, 1, AttnMaskType.causal, "self", cp_comm_type="p2p", pg_collection=groups)


def test_a_later_token_changes_nothing_before_it():
    lengths = [5, 6]
    query, key, value = tensors(11, 4, 2)
    layer = core_attention(4, 2, AttnMaskType.causal)
    before = layer(query, key, value, packed_seq_params=pack_of(lengths))
    for row in range(11):
        changed = value.clone()
        changed[row] += 1
        moved = (layer(query, key, changed, packed_seq_params=pack_of(lengths)) != before).flatten(1).any(1)
        end = 5 if row < 5 else 11
        assert moved.nonzero().flatten().tolist() == list(range(row, end))
