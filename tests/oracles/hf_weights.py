"""Transformers' SigLIP and Llama with random weights, and those weights under the names and layouts of our model.

The maps are linear in the tensors, so they carry gradients as well as weights.
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from nemo_bluelm.config.schema import ModelConfig


def hf_vision(config: ModelConfig, seed: int) -> SiglipVisionModel:
    vision = config.vision
    shape = SiglipVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.ffn_hidden_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=config.geometry.tile,
        patch_size=config.geometry.patch,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        vision_use_head=False,
        attn_implementation="eager",
    )
    return randomize(SiglipVisionModel(shape), seed)


def hf_language(config: ModelConfig, seed: int, longest: int = 512) -> LlamaForCausalLM:
    language, yarn = config.language, config.language.yarn
    scaling = None
    if yarn.factor > 1:
        scaling = dict(
            rope_type="yarn",
            factor=yarn.factor,
            original_max_position_embeddings=yarn.original_max_position_embeddings,
            beta_fast=yarn.beta_fast,
            beta_slow=yarn.beta_slow,
            mscale=yarn.mscale,
            mscale_all_dim=yarn.mscale_all_dim,
        )
    shape = LlamaConfig(
        hidden_size=language.hidden_size,
        intermediate_size=language.ffn_hidden_size,
        num_hidden_layers=language.num_layers,
        num_attention_heads=language.num_attention_heads,
        num_key_value_heads=language.num_query_groups,
        head_dim=language.kv_channels,
        vocab_size=language.vocab_size,
        rms_norm_eps=1e-6,
        rope_theta=language.rotary_base,
        rope_scaling=scaling,
        max_position_embeddings=longest,
        tie_word_embeddings=language.share_embeddings_and_output_weights,
        attn_implementation="eager",
        use_cache=False,
    )
    return randomize(LlamaForCausalLM(shape), seed)


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights that hide nothing: norms are not one, biases not zero, activations of the order of one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.empty_like(parameter).normal_(0, 1, generator=generator)
        if parameter.dim() > 1:
            table = "embed" in name and "patch" not in name
            parameter.copy_(noise * (0.25 if table else parameter[0].numel() ** -0.5))
        else:
            parameter.copy_(0.2 * noise if name.endswith("bias") else 1 + 0.2 * noise)
    return module.eval()


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    """Weights by name."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def grads(module: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients by name, zero where there is none (SigLIP's key bias moves all scores alike)."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}


def interleave_qkv(query: Tensor, key: Tensor, value: Tensor, groups: int) -> Tensor:
    """Rows as in Megatron's ``linear_qkv``: for each group its query heads, then its key, then its value."""
    rows = []
    for q, k, v in zip(query.chunk(groups), key.chunk(groups), value.chunk(groups)):
        rows += [q, k, v]
    return torch.cat(rows)


def vision_tensors(hf: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Tensors of a SiglipVisionModel under the names of our VisionTower."""
    hf = {name.removeprefix("vision_model."): tensor for name, tensor in hf.items()}
    ours = {
        "patch_embedding.weight": hf.pop("embeddings.patch_embedding.weight"),
        "patch_embedding.bias": hf.pop("embeddings.patch_embedding.bias"),
        "position_embedding": hf.pop("embeddings.position_embedding.weight"),
        "blocks.final_layernorm.weight": hf.pop("post_layernorm.weight"),
        "blocks.final_layernorm.bias": hf.pop("post_layernorm.bias"),
    }
    names = {
        "self_attn.out_proj": "self_attention.linear_proj",
        "layer_norm1": "input_layernorm",
        "layer_norm2": "pre_mlp_layernorm",
        "mlp.fc1": "mlp.linear_fc1",
        "mlp.fc2": "mlp.linear_fc2",
    }
    for layer in range(sum(name.endswith("q_proj.weight") for name in hf)):
        old, new = f"encoder.layers.{layer}.", f"blocks.layers.{layer}."
        for kind in ("weight", "bias"):
            qkv = [hf.pop(f"{old}self_attn.{part}_proj.{kind}") for part in "qkv"]
            ours[f"{new}self_attention.linear_qkv.{kind}"] = interleave_qkv(*qkv, groups=heads)
            ours |= {f"{new}{name}.{kind}": hf.pop(f"{old}{theirs}.{kind}") for theirs, name in names.items()}
    assert not hf, f"left over: {sorted(hf)}"
    return ours


def language_tensors(hf: dict[str, Tensor], groups: int) -> dict[str, Tensor]:
    """Tensors of a LlamaForCausalLM under the names of our LanguageModel; a tied head has none of its own."""
    hf = dict(hf)
    ours = {
        "embedding.word_embeddings.weight": hf.pop("model.embed_tokens.weight"),
        "decoder.final_layernorm.weight": hf.pop("model.norm.weight"),
    }
    if "lm_head.weight" in hf:
        ours["output_layer.weight"] = hf.pop("lm_head.weight")
    names = {
        "self_attn.o_proj": "self_attention.linear_proj",
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "pre_mlp_layernorm",
        "mlp.down_proj": "mlp.linear_fc2",
    }
    for layer in range(sum(name.endswith("q_proj.weight") for name in hf)):
        old, new = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        qkv = [hf.pop(f"{old}self_attn.{part}_proj.weight") for part in "qkv"]
        ours[f"{new}self_attention.linear_qkv.weight"] = interleave_qkv(*qkv, groups=groups)
        gate_up = [hf.pop(f"{old}mlp.{part}_proj.weight") for part in ("gate", "up")]
        ours[f"{new}mlp.linear_fc1.weight"] = torch.cat(gate_up)
        ours |= {f"{new}{name}.weight": hf.pop(f"{old}{theirs}.weight") for theirs, name in names.items()}
    assert not hf, f"left over: {sorted(hf)}"
    return ours


@torch.no_grad()
def load(module: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy weights into our module; every parameter must be given, and nothing else."""
    parameters = dict(module.named_parameters())
    assert parameters.keys() == tensors.keys(), sorted(parameters.keys() ^ tensors.keys())
    for name, tensor in tensors.items():
        assert parameters[name].shape == tensor.shape, name
        parameters[name].copy_(tensor)


def normalized(tiles: Tensor) -> Tensor:
    """Pixels as SigLIP's image processor gives them: scaled to [0, 1], mean and std of one half."""
    return (tiles.float() / 255 - 0.5) / 0.5
