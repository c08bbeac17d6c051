"""Core attention without Transformer Engine: packs, grouped queries, context parallelism, full attention."""

from typing import Optional

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from nemo_bluelm.layers.context import context_indices


class PackedAttention(MegatronModule):
    """``core_attention`` of Megatron-Core's ``SelfAttention`` on PyTorch's scaled-dot-product attention.

    Megatron-Core's ``DotProductAttention`` takes a dense mask and knows neither packs nor context parallelism; this
    class has the interface of ``TEDotProductAttention`` instead, so that the same model runs with either.
    Dropout is not supported: BlueLM trains without.
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

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Optional[Tensor] = None,
        attn_mask_type: Optional[AttnMaskType] = None,
        attention_bias: Optional[Tensor] = None,
        packed_seq_params: Optional[PackedSeqParams] = None,
    ) -> Tensor:
        """Attend inside each document of a pack, or over whole sequences when there is no pack.

        Args:
            query: [t, heads, d] with a pack, [s, b, heads, d] without.
            key, value: as ``query``, with ``groups`` heads.
            packed_seq_params: documents in ``thd`` format; ``cu_seqlens_q_padded`` tells where each one lies.

        Returns:
            [t, heads, d] with a pack, [s, b, heads * d] without.
        """
        if packed_seq_params is None:
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)), causal=self.causal)
            return out.permute(2, 0, 1, 3).flatten(2)
        bounds = packed_seq_params.cu_seqlens_q_padded
        if self.cp_group.size() > 1:
            return self._forward_context_parallel(query, key, value, bounds)
        lengths = bounds.diff().tolist()
        documents = zip(query.split(lengths), key.split(lengths), value.split(lengths))
        return torch.cat([self._attend_rows(q, k, v) for q, k, v in documents])

    def _forward_context_parallel(self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> Tensor:
        """All-gather keys and values, put them back in document order, attend with this rank's two chunks."""
        size = self.cp_group.size()
        order = torch.cat([context_indices(bounds, size, rank) for rank in range(size)]).argsort()
        # One gather for both; its backward sums the gradients of all ranks' queries and returns this rank's rows.
        both = gather_from_sequence_parallel_region(torch.stack((key, value), dim=1), group=self.cp_group)
        key, value = both.index_select(0, order).unbind(1)
        outputs, done = [], 0
        starts = bounds.tolist()
        for start, end in zip(starts, starts[1:]):
            chunk = (end - start) // (2 * size)
            for part in (self.cp_group.rank(), 2 * size - 1 - self.cp_group.rank()):
                visible = slice(start, start + (part + 1) * chunk)
                outputs.append(self._attend_rows(query[done : done + chunk], key[visible], value[visible]))
                done += chunk
        return torch.cat(outputs)

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
