"""A vision tower: SigLIP2 that sees no colours, for documents and X-rays."""

import torch
from torch import Tensor

from nemo_bluelm.model.vision import VisionTower

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class GreyTower(VisionTower):
    """Takes and gives what ``VisionTower`` does; its weights are SigLIP2's."""

    def forward(self, tiles: Tensor) -> Tensor:
        luma = torch.tensor(_LUMA, device=tiles.device).view(1, 3, 1, 1)
        grey = (tiles * luma).sum(1, keepdim=True).round().to(torch.uint8)
        return super().forward(grey.expand(-1, 3, -1, -1))
