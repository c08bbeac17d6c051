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

    Args:
        sources: names of the run's, in the order of ``PackedBatch.sources``; empty where nobody asks.

    Attributes:
        others: means of the further rows of the last step, fp32 [n - 1]; empty where there is one.
        by_source: mean loss of each source's targets in the last step, fp32 [sources], NaN where it had none; on the
            last pipeline stage.
    """

    others: Tensor = torch.empty(0)
    by_source: Tensor = torch.empty(0)

    def __init__(self, sources: tuple[str, ...] = ()):
        super().__init__()
        self.sources = sources

    def forward(self, batch, row_losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """
        Args:
            batch: the PackedBatch of this micro-batch.
            row_losses: fp32 [n, S / context size]; the first is trained on, others are only reported.

        Returns:
            The sum, the number of targets (int32) on this rank, and for :meth:`reduce` the sums of all rows, of each
            source, the targets of each source, and all targets.
        """
        mask = context_rows(batch.loss_mask, batch.bounds)
        totals = (row_losses.float() * mask).sum(1)
        count = mask.sum()
        sums = [totals.detach()]
        if self.sources:
            places = torch.arange(len(self.sources), device=mask.device)[:, None]
            of_source = (context_rows(batch.sources, batch.bounds) == places) * mask
            sums += [(of_source * row_losses[0].detach().float()).sum(1), of_source.sum(1)]
        return totals[0], count.to(torch.int32), {"sums_and_count": torch.cat((*sums, count[None]))}

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, Tensor]]) -> Tensor:
        """Mean loss over all targets of the global batch; runs on the last pipeline stage."""
        total = torch.stack([loss["sums_and_count"] for loss in losses_reduced_per_micro_batch]).sum(0)
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        rows, sums, targets, count = total.split(
            [total.numel() - 2 * len(self.sources) - 1, *2 * [len(self.sources)], 1]
        )
        self.by_source = sums / targets  # 0 / 0 is NaN
        means = rows / count.clamp(min=1.0)
        self.others = means[1:]
        return means[0]
