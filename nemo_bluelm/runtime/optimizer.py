"""NeMo's Megatron optimizer, whose steps the host doesn't wait for. Before one, gradients are summed over shared tiles
and divided by the targets."""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, clip_grads
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from nemo import lightning as nl
from nemo.lightning.megatron_parallel import MegatronParallel
from nemo.lightning.pytorch.optim.base import LRSchedulerModule
from torch import Tensor

from nemo_bluelm.runtime.param_groups import Multipliers, split_by
from nemo_bluelm.runtime.sharing import sum_tile_gradients
from nemo_bluelm.runtime.torch_adam import TorchDistributedOptimizer


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
            optimizers = super().optimizers(model)
        for optimizer in optimizers:
            parts = optimizer.mcore_optimizer.chained_optimizers
            for part in parts if not HAVE_APEX_OR_TE else ():
                if isinstance(part, DistributedOptimizer):
                    part.__class__ = TorchDistributedOptimizer  # Megatron-Core makes it, by name
            optimizer.mcore_optimizer = _Chained(parts)
        return optimizers

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


class _Chained(ChainedOptimizer):
    """Megatron-Core's optimizers, whose gradients are clipped on the device.

    Megatron-Core's own asks the GPU for the gradient norm, so the next step begins with a GPU that waits for the host:
    60 of 1600 ms of a 4K BF16 step on an H100.

    Attributes:
        takes: whether the update of a step of this loss and gradient norm is taken; None takes all without asking.
        loss: of the step, [] on the device.
    """

    takes: Optional[Callable[[Tensor, Tensor], bool]] = None
    loss: Tensor

    def __init__(self, chained_optimizers: list[MegatronOptimizer]):
        """Make Adam's state, which Adam itself would make in its first update.

        The tensors of the first checkpoints decide what is in all of a run, and updates may be left out until then.
        """
        super().__init__(chained_optimizers)
        for part in chained_optimizers:
            if part.is_stub_optimizer:
                continue
            part.init_state_fn(part.optimizer, part.config)
            if isinstance(part.optimizer, torch.optim.Adam):
                _count_steps(part.optimizer, {"state": part.optimizer.state})
                part.optimizer.register_load_state_dict_pre_hook(_count_steps)

    @torch.no_grad()
    def step(self) -> tuple[bool, Tensor, None]:
        """Megatron-Core's hook.

        Returns:
            Whether weights were updated; the gradient norm before clipping, fp64 [] on the device; zeros in the
            gradient, which aren't counted.
        """
        self.prepare_grads()
        norm = self._norm()
        if self.takes is not None and not self.takes(self.loss, norm):
            return False, norm, None
        if self.config.clip_grad > 0:
            factor = (self.config.clip_grad / (norm + 1e-6)).clamp(max=1.0).float()  # as clip_grad_by_total_norm_fp32
            grads = [parameter.grad for parameter in self.main_parameters() if parameter.grad is not None]
            if grads:
                torch._foreach_mul_(grads, factor)
        return self.step_with_ready_grads(), norm, None

    def main_parameters(self) -> list[Tensor]:
        """What is updated: of a BF16 model, fp32 weights; of a distributed optimizer, this rank's shard of them."""
        return [parameter for optimizer in self.chained_optimizers for parameter in optimizer.get_parameters()]

    def _norm(self) -> Tensor:
        """As ``get_grad_norm_fp32``."""
        grads = [grad for optimizer in self.chained_optimizers for grad in optimizer.get_main_grads_for_grad_norm()]
        if grads:
            overflow = torch.zeros(1, dtype=torch.int, device="cuda")
            norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [grads], False)
        else:
            norm = torch.zeros(1, dtype=torch.float, device="cuda")
        square = norm**2
        torch.distributed.all_reduce(square, group=self.get_grad_stats_parallel_group())
        return square[0].double().sqrt()


def _count_steps(optimizer: torch.optim.Adam, state_dict: dict[str, Any]) -> None:
    """Have the counts of steps that PyTorch's Adam keeps; Megatron-Core neither makes them nor writes those of 0."""
    for state in state_dict["state"].values():
        state.setdefault("step", torch.zeros(()))


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
