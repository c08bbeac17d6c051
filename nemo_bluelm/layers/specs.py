"""What a transformer layer is built of: Transformer Engine's modules, or local ones that run anywhere."""

from typing import Optional

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_bluelm.layers.attention import PackedAttention
from nemo_bluelm.layers.linear import BiasedRowParallelLinear
from nemo_bluelm.layers.norm import LocalNorm


def te_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One layer of Transformer Engine modules (fused norm + linear, fused MLP, fused attention, FP8)."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    from nemo_bluelm.layers.te import FusedMLP, RotarySelfAttention, TEGatheredAttention, TEPackedAttention

    spec = get_gpt_layer_with_transformer_engine_spec()
    if getattr(config, "fused_mlp", True):
        spec.submodules.mlp = ModuleSpec(module=FusedMLP)
    gathered = config.context_parallel_size > 1 and config.cp_comm_type != "p2p"
    spec.submodules.self_attention.module = RotarySelfAttention
    spec.submodules.self_attention.submodules.core_attention = TEGatheredAttention if gathered else TEPackedAttention
    return spec


def local_layer_spec() -> ModuleSpec:
    """One layer of Megatron-Core's parallel linear layers with our norm and attention; runs anywhere."""
    spec = get_gpt_layer_local_spec()
    spec.submodules.input_layernorm = LocalNorm
    spec.submodules.pre_mlp_layernorm = LocalNorm
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    spec.submodules.mlp.submodules.linear_fc2 = BiasedRowParallelLinear
    return spec


def block_spec(config: TransformerConfig, causal: bool, vp_stage: Optional[int] = None) -> TransformerBlockSubmodules:
    """The layers that this pipeline rank (and virtual stage) builds, and the norm that closes the block.

    ``config.transformer_impl`` chooses the modules: "transformer_engine" or "local".
    """
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = te_layer_spec(config), TENorm
    else:
        layer, norm = local_layer_spec(), LocalNorm
    attention = layer.submodules.self_attention
    if config.qk_layernorm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = LocalNorm
    # Megatron-Core's own local ViT spec is causal, which a ViT must not be.
    attention.params["attn_mask_type"] = AttnMaskType.causal if causal else AttnMaskType.no_mask
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)
