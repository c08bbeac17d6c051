"""NeMo's Megatron optimizer, which also sums the gradients of what ranks work on in turns."""

from collections.abc import Sequence

import torch
from nemo import lightning as nl

from nemo_bluelm.runtime.sharing import sum_tile_gradients


class SharingOptimizer(nl.MegatronOptimizerModule):
    """For models whose tensor-parallel ranks split the ViT's tiles (``parallel.share_tiles``)."""

    def finalize_model_grads(self, model: Sequence[torch.nn.Module], *args, **kwargs) -> None:
        """Megatron's hook at the end of a step's backward passes."""
        super().finalize_model_grads(model, *args, **kwargs)
        sum_tile_gradients(model)
