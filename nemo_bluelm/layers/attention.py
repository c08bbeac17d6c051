"""Attention on packs: inside each document, over context-parallel ranks, and over whole sequences without a pack."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Optional

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from nemo_bluelm.layers.context import Bounds, Spans, document_order, visible_keys, whole_documents
from nemo_bluelm.layers.kv_cache import CachedAttention


@dataclass
class PackParams(PackedSeqParams):
    """Megatron-Core's description of a pack.

    Attributes:
        bounds: where the documents lie, as n + 1 integers of the host; None under CUDA graphs, which can't see them
            change.
        equal_segments: as :attr:`nemo_bluelm.data.packs.PackedBatch.equal_segments`.
    """

    bounds: Bounds | None = None
    equal_segments: int = 0


class PackedAttention(CachedAttention, MegatronModule):
    """``core_attention`` of Megatron-Core's ``SelfAttention`` on packs, with any context parallelism around one kernel.

    Megatron-Core's ``DotProductAttention`` takes a dense mask and knows neither packs nor context parallelism; this
    class has the interface of ``TEDotProductAttention`` instead, so that the same model runs with either. The kernel is
    :meth:`varlen`, here PyTorch's scaled-dot-product attention a document at a time; a subclass can bring another.
    Dropout is not supported: BlueLM trains without.

    Args:
        cp_comm_type: how context-parallel ranks see each other's tokens, "all_gather" or "a2a".
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: Optional[float] = None,
        cp_comm_type: Optional[str] = None,
        pg_collection: Optional[ProcessGroupCollection] = None,
    ):
        super().__init__(config)
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.cp_group = pg_collection.cp
        self.causal = attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        self.softmax_scale = softmax_scale
        ways = {"all_gather": self._all_gather, "a2a": self._all_to_all}
        if self.cp_group.size() > 1 and (cp_comm_type or "all_gather") not in ways:
            raise ValueError(f"cp_comm_type {cp_comm_type!r} is none of {', '.join(ways)}")
        self._over_ranks = ways.get(cp_comm_type, self._all_gather)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Optional[Tensor] = None,
        attn_mask_type: Optional[AttnMaskType] = None,
        attention_bias: Optional[Tensor] = None,
        packed_seq_params: Optional[PackParams] = None,
    ) -> Tensor:
        """Attend inside each document of a pack, or over whole sequences when there is no pack.

        Args:
            query: [t, heads, d] with a pack, [s, b, heads, d] without.
            key, value: as ``query``, with ``groups`` heads.
            packed_seq_params: the documents; their padded bounds tell where each one lies.

        Returns:
            [t, heads, d] with a pack, [s, b, heads * d] without.
        """
        if (out := self.cached(query, key, value)) is not None:
            return out
        if packed_seq_params is None:
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)), causal=self.causal)
            return out.permute(2, 0, 1, 3).flatten(2)
        bounds = packed_seq_params.bounds
        if self.cp_group.size() == 1:
            return self.varlen(query, key, value, whole_documents(bounds, query.device))
        return self._over_ranks(query, key, value, bounds)

    def varlen(self, query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
        """Attention of segments of queries to segments of keys.

        Args:
            query: [queries, heads, d].
            key, value: [keys, groups, d].
            spans: the pairs of segments; with a causal mask the last query of a pair sees its last key.

        Returns:
            [queries, heads, d].
        """
        queries, keys = ([end - start for start, end in pairwise(bounds)] for bounds in (spans.queries, spans.keys))
        segments = zip(query.split(queries), key.split(keys), value.split(keys))
        return torch.cat([self._attend_rows(q, k, v) for q, k, v in segments if len(q)])

    def _all_gather(self, query: Tensor, key: Tensor, value: Tensor, bounds: Bounds) -> Tensor:
        """Keys and values of all ranks on each; every one of this rank's chunks takes those that it sees."""
        rows, spans = visible_keys(bounds, self.cp_group.size(), self.cp_group.rank(), query.device)
        # One gather for both; its backward sums the gradients of all ranks' queries and returns this rank's rows.
        both = gather_from_sequence_parallel_region(torch.stack((key, value), dim=1), group=self.cp_group)
        # A row is seen by two of the chunks at most, so its gradient is the same in any order of summation.
        key, value = both.index_select(0, rows).unbind(1)
        return self.varlen(query, key, value, spans)

    def _all_to_all(self, query: Tensor, key: Tensor, value: Tensor, bounds: Bounds) -> Tensor:
        """All rows of a share of the heads on each rank, for whole documents (Ulysses, arXiv 2309.14509)."""
        size = self.cp_group.size()
        to_pack, to_ranks = document_order(bounds, size, query.device)
        # One exchange for all three: the heads of a rank lie together, queries, keys and values.
        shares = [x.unflatten(1, (size, -1)) for x in (query, key, value)]
        heads = [share.size(2) for share in shares]
        mine = torch.cat(shares, 2).transpose(0, 1).flatten(0, 1)  # [size * t, heads + 2 * groups, d]
        whole = all_to_all(self.cp_group, mine).index_select(0, to_pack)
        out = self.varlen(*whole.split(heads, 1), whole_documents(bounds, query.device))
        out = all_to_all(self.cp_group, out.index_select(0, to_ranks))
        return out.unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2)

    def _attend_rows(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[q, heads, d] x [k, groups, d] -> [q, heads, d]; the last query sees the last key."""
        out = self._attend(*(x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)), causal=self.causal)
        return out.squeeze(0).transpose(0, 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        """[b, heads, q, d] x [b, groups, k, d] -> [b, heads, q, d]."""
        same_length = query.size(2) == key.size(2)
        mask = None if same_length or not causal else causal_lower_right(query.size(2), key.size(2))
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal and same_length,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )
