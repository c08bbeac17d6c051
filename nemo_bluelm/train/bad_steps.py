"""Updates that would do harm, left out: a loss or gradient that is NaN, infinite, or far above those before."""

import math
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from nemo_bluelm.errors import UserError
from nemo_bluelm.train.events import note

WINDOW, LEAST = 100, 20  # accepted steps that a step is compared with, and how many it takes to compare


class BadSteps(Callback):
    """Decides before each update whether it is taken; the same on all ranks, and after a resume as without one.

    The host waits for the gradient norm to decide, so the GPU is idle until it has queued the update: about 3 % of a
    step of the 2.9B model on one H100. A step that is left out counts as a step: its data is consumed, the learning
    rate goes on, weights and optimizer state stay.

    Args:
        run_dir: where to note them.
        most: bad steps in a row after which the next one ends the run.
        spike_factor: a loss or gradient norm above this many times the median of the last ``WINDOW`` is bad, too; 0:
            only NaN and infinite ones.
    """

    def __init__(self, run_dir: Path, name: str, most: int, spike_factor: float):
        self.run_dir, self.name, self.most, self.spike_factor = run_dir, name, most, spike_factor
        self.in_a_row = 0
        self._seen: dict[str, deque[float]] = {what: deque(maxlen=WINDOW) for what in ("loss", "gradient norm")}
        self._trainer: Trainer

    def on_train_start(self, trainer: Trainer, *args) -> None:
        self._trainer = trainer
        trainer.optimizers[0].mcore_optimizer.takes = self.takes

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row, "seen": {what: list(seen) for what, seen in self._seen.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row = state["in_a_row"]
        for what, seen in state["seen"].items():
            self._seen[what].extend(seen)

    def takes(self, loss: Tensor, norm: Tensor) -> bool:
        """Whether the update is taken.

        Args:
            loss, norm: of the step, [] each; on all ranks.

        Raises:
            UserError: too many in a row were not.
        """
        both = torch.stack((loss.detach().double().reshape(()), norm.double().reshape(())))
        finite = both.isfinite()
        told = torch.cat((torch.where(finite, both, -1.0), (~finite).double()))
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)  # ranks must decide alike
        *values, bad_loss, bad_norm = told.tolist()
        values = [math.nan if bad else value for value, bad in zip(values, (bad_loss, bad_norm))]
        reason = self._objection(values)
        if reason is None:
            self.in_a_row = 0
            for seen, value in zip(self._seen.values(), values):
                seen.append(value)
            return True
        self.in_a_row += 1
        step = self._trainer.global_step + 1
        if self.in_a_row > self.most:
            raise UserError(
                f"step {step} of the run in {self.run_dir}: {reason}, as in the {self.most} steps before, which were "
                "left out; lower optim.lr or look at the data of these steps, then type the same command to go on from "
                "the newest checkpoint"
            )
        if self._trainer.is_global_zero:
            print(f"{self.name}  step {step} is left out: {reason}", file=sys.stderr, flush=True)
            note(self.run_dir, "left_out", step, reason)
        return False

    def _objection(self, values: Sequence[float]) -> str | None:
        for (what, seen), value in zip(self._seen.items(), values):
            if not math.isfinite(value):
                return f"its {what} is NaN or infinite"
            usual = statistics.median(seen) if len(seen) >= LEAST else math.inf
            if self.spike_factor and value > self.spike_factor * usual > 0:
                return f"its {what} is {value:.3g}, {value / usual:.2f} times the median of the last {len(seen)}"
        return None
