"""The next-token loss over a global batch of packs."""

import torch
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor

from nemo_bluelm.layers.context import context_rows


class TokenLoss(MegatronLossReduction):
    """Cross-entropy summed over target tokens; Megatron divides by their number in the whole global batch.

    A mean per micro-batch would weigh a target in a nearly empty pack more than one in a full pack, and would make
    the result depend on the data-parallel layout.

    Attributes:
        others: means of the further rows of the last step, fp32 [n - 1]; empty where there is one.
    """

    others: Tensor = torch.empty(0)

    def forward(self, batch, row_losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """
        Args:
            batch: the PackedBatch of this micro-batch.
            row_losses: fp32 [n, S / context size]; the first is trained on, others are only reported.

        Returns:
            The sum, the number of targets (int32) on this rank, and all sums with it for :meth:`reduce`.
        """
        mask = context_rows(batch.loss_mask, batch.bounds)
        totals = (row_losses.float() * mask).sum(1)
        count = mask.sum()
        return totals[0], count.to(torch.int32), {"sums_and_count": torch.cat((totals.detach(), count[None]))}

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, Tensor]]) -> Tensor:
        """Mean loss over all targets of the global batch; runs on the last pipeline stage."""
        total = torch.stack([loss["sums_and_count"] for loss in losses_reduced_per_micro_batch]).sum(0)
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        means = total[:-1] / total[-1].clamp(min=1.0)
        self.others = means[1:]
        return means[0]
