"""NeMo's Megatron optimizer; before its step, gradients are summed over shared tiles and divided by the targets."""

from collections.abc import Sequence
from typing import Optional

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.lightning.megatron_parallel import MegatronParallel
from nemo.lightning.pytorch.optim.base import LRSchedulerModule
from torch import Tensor

from nemo_bluelm.runtime.param_groups import Multipliers, split_by
from nemo_bluelm.runtime.sharing import sum_tile_gradients


class Optimizer(nl.MegatronOptimizerModule):
    """MegatronOptimizerModule that finishes gradients without making the host wait for the GPU.

    Args:
        config, lr_scheduler: as MegatronOptimizerModule. NeMo builds the module anew from the arguments' names for
            every further virtual stage, so they are spelt out.
        share_tiles: tensor-parallel ranks split the ViT's tiles (``parallel.share_tiles``).
        multipliers: of learning rate and weight decay, by weight.
    """

    def __init__(
        self, config: OptimizerConfig, lr_scheduler: LRSchedulerModule, share_tiles: bool, multipliers: Multipliers
    ):
        super().__init__(config, lr_scheduler)
        self.share_tiles, self.multipliers = share_tiles, multipliers

    def optimizers(self, model: MegatronParallel) -> list[torch.optim.Optimizer]:
        """NeMo's hook that builds the optimizer."""
        with split_by(self.multipliers):
            return super().optimizers(model)

    def finalize_model_grads(
        self, model: Sequence[torch.nn.Module], num_tokens: Optional[Tensor] = None, **options
    ) -> None:
        """Megatron's hook at the end of a step's backward passes.

        Args:
            model: the DistributedDataParallel modules of this rank.
            num_tokens: int [], targets that this rank counted; on the last pipeline stage only.
        """
        super().finalize_model_grads(model, None, **options)
        if num_tokens is not None:
            _divide_by_targets(model, num_tokens)
        if self.share_tiles:
            sum_tile_gradients(model)


def _divide_by_targets(model: Sequence[torch.nn.Module], num_tokens: Tensor) -> None:
    """Megatron-Core does it too, but asks the GPU first whether there are any."""
    last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(num_tokens, last_stage, group=parallel_state.get_pipeline_model_parallel_group())
    torch.distributed.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    scale = 1.0 / num_tokens.clamp(min=1)
    for chunk in model:
        for buffer in chunk.buffers:
            # As scale_gradients, whose product with a tensor of one element takes a kernel that is half as fast.
            torch._foreach_mul_([buffer.grad_data], scale)
