"""Learning rate over the steps of a run."""

import math

from nemo.lightning.pytorch.optim.base import LRSchedulerModule
from torch.optim.lr_scheduler import LambdaLR

from nemo_bluelm.config.schema import OptimConfig, Schedule


def lr_at(step: int, steps: int, optim: OptimConfig) -> float:
    """Learning rate of optimizer step ``step`` (from 0) of ``steps``: linear warm-up, then the schedule."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == Schedule.constant:
        return optim.lr
    progress = min(1.0, (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps))
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


class LearningRate(LRSchedulerModule):
    """:func:`lr_at` as NeMo's scheduler module."""

    def __init__(self, steps: int, optim: OptimConfig):
        super().__init__()
        self.steps = steps
        self.optim_config = optim

    def scheduler(self, model, optimizer) -> dict:
        schedule = LambdaLR(optimizer, lambda step: lr_at(step, self.steps, self.optim_config) / self.optim_config.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1}}
