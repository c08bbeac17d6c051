"""Learning rate over the steps of a run."""

import math

from nemo.lightning.pytorch.optim.base import LRSchedulerModule
from torch.optim.lr_scheduler import LambdaLR

from nemo_bluelm.config.optim import DecayShape, OptimConfig, Schedule

# Share of lr - min_lr that is left at the share p of the decay.
_SHAPES = {
    DecayShape.sqrt: lambda p: 1.0 - math.sqrt(p),
    DecayShape.linear: lambda p: 1.0 - p,
    DecayShape.cosine: lambda p: 0.5 * (1.0 + math.cos(math.pi * p)),
}


def lr_at(step: int, steps: int, optim: OptimConfig, tokens_per_step: int) -> float:
    """Learning rate of an optimizer step: linear warm-up, then the schedule.

    A decay begins with ``optim.lr`` and would reach ``optim.min_lr`` in the step after its last, so that no step is
    wasted on a learning rate of 0.

    Args:
        step: from 0.
        steps: of the run.
        optim: a checked one.
        tokens_per_step: of a global batch, padding included; only ``optim.warmup_tokens`` needs them, as whole steps.
    """
    warmup = optim.warmup_steps
    if optim.warmup_tokens is not None:
        warmup = -(-optim.warmup_tokens // tokens_per_step)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == Schedule.constant:
        return optim.lr
    if optim.schedule == Schedule.two_stage:
        return optim.lr if step < round(optim.second_stage_from * steps) else optim.second_lr
    decays = optim.schedule == Schedule.wsd
    first = steps - optim.decay_steps if decays else warmup
    shape = _SHAPES[optim.decay_shape if decays else DecayShape.cosine]
    progress = min(1.0, max(0, step - first) / max(1, steps - first))
    return optim.min_lr + (optim.lr - optim.min_lr) * shape(progress)


class LearningRate(LRSchedulerModule):
    """:func:`lr_at` as NeMo's scheduler module; a parameter group keeps its own share of it.

    Args:
        steps, optim, tokens_per_step: as :func:`lr_at`.
    """

    def __init__(self, steps: int, optim: OptimConfig, tokens_per_step: int):
        super().__init__()
        self.steps, self.optim_config, self.tokens_per_step = steps, optim, tokens_per_step

    def scheduler(self, model, optimizer) -> dict:
        schedule = LambdaLR(optimizer, self._factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1}}

    def _factor(self, step: int) -> float:
        return lr_at(step, self.steps, self.optim_config, self.tokens_per_step) / self.optim_config.lr
