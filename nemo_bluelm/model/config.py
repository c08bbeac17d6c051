"""From the recipe's model section to the Megatron-Core configurations of its two transformers."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_bluelm.config.schema import Dtype, LanguageConfig, ParallelConfig, VisionConfig

HAVE_TE = torch.cuda.is_available() and find_spec("transformer_engine") is not None
TORCH_DTYPE = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}


@dataclass
class LanguageTransformerConfig(TransformerConfig):
    """``TransformerConfig`` with the YaRN fields that Megatron-Core 0.15 reads but does not declare.

    A ``yarn_rotary_scaling_factor`` of 1 is plain RoPE: frequencies and attention scale are unchanged.
    """

    yarn_rotary_scaling_factor: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float = 1.0
    yarn_mscale_all_dim: float = 0.0
    yarn_correction_range_round_to_int: bool = True


# What the ViT's configuration takes over from the language model's.
SHARED = (
    *("hidden_dropout", "attention_dropout", "params_dtype", "bf16", "transformer_impl"),
    *("perform_initialization", "use_cpu_initialization", "calculate_per_token_loss"),
    *("persist_layer_norm", "masked_softmax_fusion", "gradient_accumulation_fusion", "bias_dropout_fusion"),
)


def language_transformer_config(
    language: LanguageConfig, parallel: ParallelConfig, dtype: torch.dtype
) -> LanguageTransformerConfig:
    """Megatron-Core configuration of the language model under one parallel layout."""
    return LanguageTransformerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.ffn_hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_query_groups,
        kv_channels=language.kv_channels,
        layernorm_epsilon=language.layernorm_epsilon,
        init_method_std=language.init_method_std,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        bias_activation_fusion=HAVE_TE,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        context_parallel_size=parallel.context,
        pipeline_dtype=dtype,
        # With two pipeline ranks, the batched sends of an interleaved schedule go to one peer and are mixed up.
        overlap_p2p_comm=parallel.virtual_pipeline is not None,
        batch_p2p_comm=parallel.virtual_pipeline is None,
        yarn_rotary_scaling_factor=language.yarn.factor,
        yarn_original_max_position_embeddings=language.yarn.original_max_position_embeddings,
        yarn_beta_fast=language.yarn.beta_fast,
        yarn_beta_slow=language.yarn.beta_slow,
        yarn_mscale=language.yarn.mscale,
        yarn_mscale_all_dim=language.yarn.mscale_all_dim,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        transformer_impl="transformer_engine" if HAVE_TE else "local",
        perform_initialization=False,  # nemo_bluelm.model.init fills every tensor, the same in every layout
        use_cpu_initialization=not torch.cuda.is_available(),
        calculate_per_token_loss=True,  # gradients are divided by the global number of target tokens
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=HAVE_TE,
        apply_rope_fusion=False,  # Megatron-Core's fused RoPE drops YaRN's attention scale
    )


def vision_transformer_config(vision: VisionConfig, language: LanguageTransformerConfig) -> TransformerConfig:
    """Megatron-Core configuration of the ViT beside a language model's.

    The ViT is never split over ranks: its sizes don't divide well and tiles do.
    """
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        layernorm_epsilon=vision.layernorm_epsilon,
        normalization="LayerNorm",
        activation_func=gelu_tanh,
        add_bias_linear=True,
        bias_activation_fusion=False,
        **{name: getattr(language, name) for name in SHARED},
    )


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """SigLIP's activation (transformers ``gelu_pytorch_tanh``)."""
    return F.gelu(x, approximate="tanh")
