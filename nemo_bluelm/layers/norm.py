"""Normalisation of the local (no Transformer Engine) layer spec."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class LocalNorm:
    """``torch.nn.RMSNorm`` or ``LayerNorm``, whichever ``config.normalization`` names, fit for sequence parallelism.

    Megatron-Core's own wrapper refuses sequence parallelism because it does not mark its weights: they see only a
    slice of the sequence on each tensor-parallel rank, so their gradients must be summed over that group.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
        norm_class = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}[config.normalization]
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        norm = norm_class(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
