"""Which sequence each token belongs to, and sums over sequences: the same for packs, padded rows and parts of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Segments:
    """Sequences of the tokens of a pack.

    Nothing here waits for a GPU. Sums are made in fp64: the order of the tokens, of the ranks and of a GPU's atomic
    additions then hardly ever reaches a rounded result.

    Attributes:
        ids: int64 [T], the sequence of each token, from 0; tokens of one sequence may lie anywhere. Pads and the tail
            of a pack need a number too, any will do because they are masked.
        count: how many sequences there are, or more.
        group: ranks that hold the other tokens of the same sequences (context parallel); None where there are none.
    """

    ids: Tensor
    count: int
    group: ProcessGroup | None = None

    @classmethod
    def of_lengths(
        cls, lengths: Sequence[int], device: torch.device | None = None, group: ProcessGroup | None = None
    ) -> "Segments":
        """Sequences that lie one after another, ``lengths[i]`` tokens each; rows of T tokens are ``[T] * B``."""
        ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
        return cls(ids.to(device, non_blocking=True), len(lengths), group)

    def sum(self, values: Tensor) -> Tensor:
        """fp64 [count], without gradients: what ``values`` [T] sum up to in each sequence, over all ranks."""
        total = torch.zeros(self.count, dtype=torch.float64, device=values.device)
        total.index_add_(0, self.ids, values.detach().double())
        if self.group is not None and self.group.size() > 1:
            torch.distributed.all_reduce(total, group=self.group)
        return total

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """fp64 [count]: the mean of each sequence's unmasked tokens, 0 where it has none."""
        keep = mask.bool()
        return self.sum(values.where(keep, 0)) / self.sum(keep).clamp(min=1)

    def spread(self, values: Tensor) -> Tensor:
        """[T]: to each token the value of its sequence, of ``values`` [count]."""
        return values.index_select(0, self.ids)
