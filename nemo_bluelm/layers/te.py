"""Transformer Engine where Megatron-Core 0.15 does not wrap it, or at a cost. Import it only where TE is used."""

import sys
from types import ModuleType
from typing import Optional

import torch
import transformer_engine.pytorch as te
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.tensor_parallel import layers as parallel_layers
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from transformer_engine.pytorch.cpp_extensions import general_gemm
from transformer_engine.pytorch.module.base import get_workspace
from transformer_engine.pytorch.utils import SplitAlongDim

from nemo_bluelm.layers.attention import PackedAttention, PackParams
from nemo_bluelm.layers.context import Spans
from nemo_bluelm.layers.kv_cache import CachedAttention
from nemo_bluelm.layers.rotary import split_rotary

# Names of FusedMLP's tensors in checkpoints, where Megatron-Core's own MLP has two linear layers.
CHECKPOINT_NAMES = {
    "layer_norm_weight": "linear_fc1.layer_norm_weight",
    "layer_norm_bias": "linear_fc1.layer_norm_bias",
    "fc1_weight": "linear_fc1.weight",
    "fc1_bias": "linear_fc1.bias",
    "fc2_weight": "linear_fc2.weight",
    "fc2_bias": "linear_fc2.bias",
}


class FusedMLP(te.LayerNormMLP):
    """Norm, linear, activation, linear in one autograd node, in the place of Megatron-Core's ``MLP``.

    Transformer Engine then quantises inside the activation's kernels (FP8), or runs GELU inside the matrix products
    (BF16), and keeps one tensor less. Checkpoints have the names of Megatron-Core's MLP.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules=None,
        is_expert: bool = False,
        input_size: Optional[int] = None,
        ffn_hidden_size: Optional[int] = None,
        tp_group: Optional[torch.distributed.ProcessGroup] = None,
    ):
        parallel = config.tensor_model_parallel_size > 1
        super().__init__(
            config.hidden_size,
            config.ffn_hidden_size,
            eps=config.layernorm_epsilon,
            bias=config.add_bias_linear,
            normalization=config.normalization,
            activation="swiglu" if config.gated_linear_unit else "gelu",  # TE's gelu is the tanh approximation
            fuse_wgrad_accumulation=config.gradient_accumulation_fusion,
            params_dtype=config.params_dtype,
            set_parallel_mode=parallel,
            sequence_parallel=config.sequence_parallel,
            tp_group=parallel_state.get_tensor_model_parallel_group() if parallel else None,
            init_method=lambda weight: None,  # nemo_bluelm.model.init fills every tensor
            output_layer_init_method=lambda weight: None,
            device=torch.cuda.current_device(),
        )
        self.bias_gelu_nvfusion = False  # the matrix products' own epilogues do bias and GELU without another pass
        self.config = config
        self.is_first_microbatch = True  # set by Megatron's schedules; FP8 weights are cast once a step

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """[s, b, hidden] -> [s, b, hidden], and no bias left to add."""
        out = super().forward(hidden_states, is_first_microbatch=self.is_first_microbatch)
        self.is_first_microbatch = False
        return out, None

    def get_weight_workspace(self, *, tensor: Tensor, **options):
        """The FP8 copy of a weight. TE 2.9 asks the copy of fc1's, not the weight, whether its gradient is accumulated
        by the product, and then tells Megatron's hooks that there is none."""
        copy = super().get_weight_workspace(tensor=tensor, **options)
        if hasattr(tensor, "grad_added_to_main_grad"):
            copy.grad_added_to_main_grad = False
        return copy

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: Optional[dict] = None
    ) -> ShardedStateDict:
        """Megatron-Core's hook."""
        axes = {"fc1_weight": 0, "fc1_bias": 0, "fc2_weight": 1}
        state = self.state_dict(prefix="", keep_vars=True)
        sharded = make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)
        for name, in_checkpoint in CHECKPOINT_NAMES.items():
            if tensor := sharded.get(f"{prefix}{name}"):
                tensor.key = f"{prefix}{in_checkpoint}"
        if self.config.gated_linear_unit:
            name = f"{prefix}fc1_weight"
            sharded[name] = apply_swiglu_sharded_factory(sharded[name], sharded_offsets)
        return sharded


class RotarySelfAttention(SelfAttention):
    """Self-attention whose queries, keys and values are split, turned by RoPE and laid out for the kernel in one pass.

    Megatron-Core 0.15 has that for dense batches only: TE's kernel turns row i by the i-th angle. Here there is an
    angle for every row of the pack (see ``model.language.LanguageModel``). Without RoPE it is Megatron-Core's own, with
    TE's split, which Megatron-Core looks for where TE 2.9 no longer has it: its gradient is no copy.
    """

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: None = None, split_qkv: bool = True
    ) -> tuple:
        """As ``SelfAttention``'s, but that what isn't split is normed too."""
        mixed, sizes = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
        if self.q_layernorm is None and not split_qkv:
            return mixed, sizes
        query, key, value = SplitAlongDim.apply(mixed, 3, sizes)
        query = query.reshape(*query.shape[:2], -1, key.size(-1))
        if self.q_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if split_qkv:
            return query, key, value
        return torch.cat((query.reshape(*key.shape[:3], -1), key, value), -1), sizes

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Optional[Tensor],
        rotary_pos_emb: Optional[Tensor] = None,
        packed_seq_params: Optional[PackParams] = None,
        **options,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """As ``SelfAttention.forward``.

        Args:
            rotary_pos_emb: fp32 [s, 1, 1, d], the angles of this rank's rows.
        """
        if rotary_pos_emb is None:
            return super().forward(hidden_states, attention_mask, packed_seq_params=packed_seq_params, **options)
        mixed, (query, key, _) = self.get_query_key_value_tensors(hidden_states, split_qkv=False)
        rows = split_rotary(mixed.flatten(0, 1), rotary_pos_emb.flatten(1), query // key)
        out = self.core_attention(
            *rows, attention_mask, attn_mask_type=self.attn_mask_type, packed_seq_params=packed_seq_params
        )
        return self.linear_proj(out.reshape(out.size(0), 1, -1))


class TEPackedAttention(CachedAttention, TEDotProductAttention):
    """Transformer Engine's attention on packs.

    - Whether a pack has gaps is not asked, because TE would wait for the GPU to answer. It has none:
      ``cu_seqlens_padded`` serves as the real bounds too (see ``model.bluelm.packed_seq_params``).
    - Documents of one length are a dense batch, whose kernels are faster.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Optional[Tensor],
        attn_mask_type: AttnMaskType,
        attention_bias: Optional[Tensor] = None,
        packed_seq_params: Optional[PackParams] = None,
    ) -> Tensor:
        """As ``TEDotProductAttention.forward``."""
        if (out := self.cached(query, key, value)) is not None:
            return out
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, attn_mask_type)
        bounds, longest = packed_seq_params.cu_seqlens_q_padded, packed_seq_params.max_seqlen_q
        documents = packed_seq_params.equal_segments
        if documents and self.config.context_parallel_size == 1:
            dense = (x.unflatten(0, (documents, -1)) for x in (query, key, value))
            out = te.DotProductAttention.forward(self, *dense, qkv_format="bshd", attn_mask_type="causal")
            return out.flatten(0, 1).unflatten(-1, query.shape[1:])
        return te.DotProductAttention.forward(
            self,
            query,
            key,
            value,
            qkv_format="thd",
            attn_mask_type="padding_causal",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            cu_seqlens_q_padded=bounds,
            cu_seqlens_kv_padded=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            pad_between_seqs=False,
        )


class TEGatheredAttention(PackedAttention):
    """:class:`PackedAttention`'s context parallelism (all_gather, a2a), which TE 2.9 has for dense batches only, around
    TE's kernels for packs."""

    def __init__(self, config: TransformerConfig, *args, cp_comm_type: Optional[str] = None, **options):
        super().__init__(config, *args, cp_comm_type=cp_comm_type, **options)
        ranks = config.tensor_model_parallel_size * (self.cp_group.size() if cp_comm_type == "a2a" else 1)
        self.kernel = te.DotProductAttention(
            num_attention_heads=config.num_attention_heads // ranks,
            kv_channels=config.kv_channels,
            num_gqa_groups=config.num_query_groups // ranks,
            attention_dropout=0.0,
            qkv_format="thd",
            softmax_scale=self.softmax_scale,
        )

    def varlen(self, query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
        out = self.kernel(
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            attn_mask_type="padding_causal_bottom_right" if self.causal else "padding",
            cu_seqlens_q=spans.cu_seqlens_q,
            cu_seqlens_kv=spans.cu_seqlens_kv,
            max_seqlen_q=spans.max_q,
            max_seqlen_kv=spans.max_kv,
            pad_between_seqs=False,
        )
        return out.unflatten(-1, query.shape[1:])


def install_wgrad_accumulation() -> None:
    """Give Megatron-Core's own linear layers (the output layer) TE's matrix product that adds to the fp32 gradient.

    Megatron-Core looks for apex's extension ``fused_weight_gradient_mlp_cuda``; where apex is installed it is used.
    """
    if parallel_layers._grad_accum_fusion_available:
        return

    def accumulate(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        general_gemm(
            inputs,
            grad_output,
            get_workspace(),
            out_dtype=main_grad.dtype,
            layout="NT",
            grad=True,
            accumulate=True,
            out=main_grad,
            use_split_accumulator=True,
        )

    extension = ModuleType("fused_weight_gradient_mlp_cuda")
    extension.wgrad_gemm_accum_fp32 = extension.wgrad_gemm_accum_fp16 = accumulate
    sys.modules[extension.__name__] = extension
    parallel_layers.fused_weight_gradient_mlp_cuda = extension
    parallel_layers._grad_accum_fusion_available = True
