"""Parameter groups with learning rates and weight decays of their own, for Megatron's optimizer."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys

from nemo_bluelm.config.optim import OptimConfig
from nemo_bluelm.config.schema import Part

_VISION_LAYER = re.compile(r"vision\.blocks\.layers\.(\d+)\.")
_VISION_EMBEDDING = re.compile(r"vision\.(patch|position)_embedding")


class Multipliers:
    """What each weight's learning rate and weight decay are, relative to those that the optimizer is built with.

    Args:
        optim: a checked one.
        vision_layers: layers of the ViT.

    Attributes:
        weight_decay: to build the optimizer with, the largest of all parts'; its learning rate is ``optim.lr``.
    """

    def __init__(self, optim: OptimConfig, vision_layers: int):
        self._optim, self._vision_layers = optim, vision_layers
        decays = [getattr(optim.parts, part.value).weight_decay for part in Part]
        self.weight_decay = max([optim.weight_decay, *(decay for decay in decays if decay is not None)])

    def of(self, name: str) -> tuple[float, float]:
        """Of the weight with this name in a BlueLMModel, whatever it is wrapped in: (learning rate, weight decay).

        The top ViT layer and the norm after it have the ViT's learning rate, each layer below
        ``optim.vision_layer_decay`` of that above it, and the embeddings that of a layer below the lowest (BEiT,
        arXiv 2106.08254; BlueLM-V-3B, arXiv 2411.10640, Table 8).
        """
        optim = self._optim
        own = getattr(optim.parts, next(word for word in name.split(".") if word in Part.__members__))
        lr = 1.0 if own.lr is None else own.lr / optim.lr
        if layer := _VISION_LAYER.search(name):
            lr *= optim.vision_layer_decay ** (self._vision_layers - 1 - int(layer[1]))
        elif _VISION_EMBEDDING.search(name):
            lr *= optim.vision_layer_decay**self._vision_layers
        decay = optim.weight_decay if own.weight_decay is None else own.weight_decay
        return lr, decay / self.weight_decay if self.weight_decay else 1.0


@contextmanager
def split_by(multipliers: Multipliers) -> Iterator[None]:
    """Megatron optimizers built inside have a parameter group for every pair of multipliers.

    Megatron-Core 0.15's own hooks, ``scale_lr_cond`` and ``lr_mult``, know one further learning rate and no further
    weight decay; checkpoints already tell groups apart by their multipliers.
    """
    original = megatron_optimizer._get_param_groups

    def get_param_groups(model_chunks: Sequence[torch.nn.Module], *args, **options) -> list[dict[str, Any]]:
        names = {weight: name for chunk in model_chunks for name, weight in chunk.named_parameters()}
        return _split(original(model_chunks, *args, **options), names, multipliers)

    megatron_optimizer._get_param_groups = get_param_groups
    try:
        yield
    finally:
        megatron_optimizer._get_param_groups = original


def _split(groups: list[dict[str, Any]], names: dict[torch.Tensor, str], multipliers: Multipliers) -> list[dict]:
    members: dict[tuple, list[torch.Tensor]] = {}
    for group in groups:
        for weight in group["params"]:
            lr, decay = multipliers.of(names[weight])
            own = {**group, "lr_mult": group["lr_mult"] * lr, "wd_mult": group["wd_mult"] * decay}
            members.setdefault(tuple(own[key] for key in param_group_identifier_keys), []).append(weight)
    # All ranks must have the same groups in one order, whatever weights they hold: schedulers and checkpoints go by
    # the order of rank 0.
    keys: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(keys, list(members))
    return [
        {**groups[0], **dict(zip(param_group_identifier_keys, key)), "params": members.get(key, [])}
        for key in sorted({key for of_rank in keys for key in of_rank}, reverse=True)
    ]
