"""From the recipe's model section to the Megatron-Core configurations of its two transformers."""

import math
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_bluelm.config.schema import (
    Dtype,
    Fp8Config,
    Fp8Recipe,
    LanguageConfig,
    ParallelConfig,
    Part,
    PrecisionConfig,
    Recompute,
    RecomputeConfig,
    VisionConfig,
    YarnConfig,
)

HAVE_GPU = torch.cuda.is_available()
HAVE_TE = HAVE_GPU and find_spec("transformer_engine") is not None
HAVE_APEX_WGRAD = HAVE_GPU and find_spec("fused_weight_gradient_mlp_cuda") is not None
TORCH_DTYPE = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}


@dataclass
class LanguageTransformerConfig(TransformerConfig):
    """``TransformerConfig`` with the YaRN fields that Megatron-Core 0.15 reads but does not declare.

    A ``yarn_rotary_scaling_factor`` of 1 is plain RoPE: frequencies and attention scale are unchanged. YaRN's attention
    scale is in ``softmax_scale``, where no RoPE kernel can lose it (Megatron-Core 0.15 drops it with fused RoPE). The
    two mscales here are equal, which makes Megatron-Core's own factor 1.

    ``fused_mlp``: with Transformer Engine the MLP is one module, which has no place for LoRA's adapters.
    """

    fused_mlp: bool = True
    yarn_rotary_scaling_factor: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float = 1.0
    yarn_mscale_all_dim: float = 1.0
    yarn_correction_range_round_to_int: bool = True


# What the ViT's configuration takes over from the language model's.
SHARED = (
    *("hidden_dropout", "attention_dropout", "params_dtype", "bf16", "transformer_impl"),
    *("perform_initialization", "use_cpu_initialization", "calculate_per_token_loss"),
    *("persist_layer_norm", "masked_softmax_fusion", "gradient_accumulation_fusion", "bias_dropout_fusion"),
)


def language_transformer_config(
    language: LanguageConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    recompute: RecomputeConfig | None = None,
    cuda_graphs: bool = False,
) -> LanguageTransformerConfig:
    """Megatron-Core configuration of the language model under one parallel layout."""
    dtype = TORCH_DTYPE[precision.dtype]
    recompute = recompute or RecomputeConfig()
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
        qk_layernorm=language.qk_layernorm,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        bias_activation_fusion=HAVE_GPU,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        context_parallel_size=parallel.context,
        cp_comm_type=parallel.context_comm.value,
        pipeline_dtype=dtype,
        # With two pipeline ranks, the batched sends of an interleaved schedule go to one peer and are mixed up.
        overlap_p2p_comm=parallel.virtual_pipeline is not None,
        batch_p2p_comm=parallel.virtual_pipeline is None,
        softmax_scale=yarn_attention_scale(language.yarn) ** 2 / math.sqrt(language.kv_channels),
        yarn_rotary_scaling_factor=language.yarn.factor,
        yarn_original_max_position_embeddings=language.yarn.original_max_position_embeddings,
        yarn_beta_fast=language.yarn.beta_fast,
        yarn_beta_slow=language.yarn.beta_slow,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        transformer_impl="transformer_engine" if HAVE_TE else "local",
        perform_initialization=False,  # nemo_bluelm.model.init fills every tensor, the same in every layout
        use_cpu_initialization=not HAVE_GPU,
        calculate_per_token_loss=True,  # gradients are divided by the global number of target tokens
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=HAVE_TE or HAVE_APEX_WGRAD,
        bias_dropout_fusion=HAVE_GPU,
        apply_rope_fusion=HAVE_TE,
        cross_entropy_loss_fusion=HAVE_TE,
        cross_entropy_fusion_impl="te",
        cuda_graph_impl="local" if cuda_graphs else "none",
        **_recompute(recompute.language, recompute.language_layers or language.num_layers),
        **_fp8(precision.fp8, Part.language),
    )


def vision_transformer_config(
    vision: VisionConfig,
    language: LanguageTransformerConfig,
    precision: PrecisionConfig | None = None,
    recompute: RecomputeConfig | None = None,
) -> TransformerConfig:
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
        **_recompute(recompute.vision if recompute else Recompute.none, vision.num_layers),
        **_fp8(precision.fp8 if precision else Fp8Config(), Part.vision),
        **{name: getattr(language, name) for name in SHARED},
    )


def yarn_attention_scale(yarn: YarnConfig) -> float:
    """What YaRN multiplies queries and keys with (arXiv 2309.00071, section 3.4); 1 without scaling.

    ``mscale_all_dim`` is DeepSeek's addition: the part of the scale that is taken out again.
    """

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0

    return scale(yarn.mscale) / scale(yarn.mscale_all_dim)


def _recompute(what: Recompute, layers: int) -> dict[str, Any]:
    if what == Recompute.mlp:
        return {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    if what == Recompute.full:
        return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": layers}
    return {}


def _fp8(fp8: Fp8Config, part: Part) -> dict[str, Any]:
    if fp8.recipe is None or part not in fp8.parts:
        return {}
    # e5m2's range is for gradients; blocks keep theirs within e4m3's.
    settings = {
        Fp8Recipe.delayed: {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 1024},
        Fp8Recipe.current: {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
        Fp8Recipe.blockwise: {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    }[fp8.recipe]
    if part == Part.language and (fp8.bf16_first_layers or fp8.bf16_last_layers):
        settings |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": fp8.bf16_first_layers,
            "num_layers_at_end_in_bf16": fp8.bf16_last_layers,
        }
    return {**settings, "fp8_amax_compute_algo": "max"}


gelu_tanh = partial(F.gelu, approximate="tanh")  # SigLIP's activation (transformers ``gelu_pytorch_tanh``)
