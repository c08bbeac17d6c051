"""Initial weights that depend on the seed and the tensor's name alone, not on the parallel layout."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor

from nemo_bluelm.config.schema import LanguageConfig


def local_shards(
    model: torch.nn.Module, of: Callable[[Tensor], Tensor] = lambda weight: weight
) -> Iterator[ShardedTensor]:
    """Every weight of the model with its global name, global shape and this rank's place in it.

    Args:
        of: what to look at instead of the weight, of the same shape: its gradient, say.

    Yields:
        ShardedTensors whose ``data`` are views; a fused tensor (SwiGLU's two halves) comes in its pieces.
    """
    for entry in model.sharded_state_dict().values():
        if isinstance(entry, ShardedTensorFactory):
            yield from replace(entry, data=of(entry.data)).build()
        elif isinstance(entry, ShardedTensor):
            data = of(entry.data)
            yield replace(entry, data=data, dtype=data.dtype)


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def initialize(model: torch.nn.Module, language: LanguageConfig, seed: int) -> None:
    """Fill every weight of a BlueLMModel: normal for matrices, one for norms, zero for biases.

    Matrices of the language model have ``init_method_std``, those that write to its residual stream
    ``init_method_std / sqrt(2 * layers)`` (GPT-2; Megatron-LM's default). ViT and projector use 1 / sqrt(fan in).
    A rank draws each global tensor whole and keeps its piece, so any tensor, pipeline or data layout starts equal.
    """
    _mark_pieces(model.language)
    for shard in local_shards(model):
        stacked = shard.prepend_axis_num  # layers share a name and are told apart by a leading axis
        layer, global_shape = shard.global_offset[:stacked], shard.global_shape[stacked:]
        if len(global_shape) == 1:
            is_norm_weight = shard.key.endswith("weight")
            shard.data.fill_(1.0 if is_norm_weight else 0.0)
            continue
        generator = _generator(seed, f"{shard.key}{list(layer)}", shard.data.device)
        full = torch.empty(global_shape, device=shard.data.device).normal_(0, 1, generator=generator)
        full *= _std(shard.key, global_shape, language)
        shard.data.copy_(full[shard.global_slice()[stacked:]])


def _mark_pieces(language: torch.nn.Module) -> None:
    """Tell the optimizer which weights are pieces, so that the gradient norm sums them over tensor-parallel ranks.

    Megatron-Core's parallel layers do it in the initialisation that we skip; Transformer Engine's always do.
    """
    for module in language.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)) and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=0, stride=1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=1, stride=1)


def _std(name: str, shape: tuple[int, ...], language: LanguageConfig) -> float:
    if not name.startswith("language."):
        return 0.02 if name.endswith("position_embedding") else 1.0 / math.sqrt(math.prod(shape[1:]))
    if name.endswith("adapter.linear_out.weight"):  # LoRA starts as nothing
        return 0.0
    if name.endswith("adapter.linear_in.weight"):
        return 1.0 / math.sqrt(shape[1])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return language.init_method_std / math.sqrt(2 * language.num_layers)
    return language.init_method_std
