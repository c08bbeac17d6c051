"""Signals, or a file that a launcher makes, end a run after a step, with a checkpoint."""

import os
import signal
import sys
from typing import Optional

import torch
from lightning.pytorch import Callback, Trainer

from nemo_bluelm.runtime.checkpoints import Checkpoints
from nemo_bluelm.runtime.later import Later, to_device

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Names a file; once it exists, the run ends as by SIGUSR1. A batch script can't signal the ranks alone: containers'
# shells, data workers and srun itself would get it, too.
STOP_FILE = "NEMO_BLUELM_STOP_FILE"


class StopOnSignal(Callback):
    """All ranks agree whether one of them was asked to stop; a second signal stops at once.

    They ask each other after every step and look at the answer after the next, when it costs no waiting. So a run
    ends up to one step later than it could.

    Attributes:
        received: number of the signal that ended the run, the same on all ranks; 0 is none.
    """

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self.received = 0
        self._noted = 0  # by this rank
        self._speaks = False
        self._answer: Optional[Later] = None
        self._previous = {}
        self._stop_file = os.environ.get(STOP_FILE)

    def _note(self, number: int, frame) -> None:
        name = signal.Signals(number).name
        if self._noted:
            self._say(f"{name} again: stopped at once; the same command goes on from the newest checkpoint")
            os._exit(128 + number)
        self._noted = number
        self._say(f"{name}: the run ends after this step, with a checkpoint; once more stops it at once")

    def _say(self, text: str) -> None:
        if self._speaks:
            os.write(sys.stderr.fileno(), f"{text}\n".encode())  # print may be what was interrupted

    def on_train_start(self, trainer: Trainer, *args) -> None:
        self._speaks = trainer.is_global_zero
        self._previous = {sig: signal.signal(sig, self._note) for sig in SIGNALS}

    def on_train_batch_end(self, trainer: Trainer, module, *args) -> None:
        if self._agreed():
            self.checkpoints.save(trainer)
            trainer.should_stop = True
        if self._stop_file and self._speaks and not self._noted and os.path.exists(self._stop_file):
            self._noted = signal.SIGUSR1
            self._say(f"{self._stop_file} is there: the run ends after this step, with a checkpoint")
        wanted = to_device([self._noted], module.device)
        torch.distributed.all_reduce(wanted, op=torch.distributed.ReduceOp.MAX)
        self._answer = Later(wanted)

    def on_train_end(self, *args) -> None:
        self._agreed()
        for sig, handler in self._previous.items():
            signal.signal(sig, handler)

    def _agreed(self) -> bool:
        """Whether the last question to all ranks was answered with a signal."""
        if self._answer is not None and not self.received:
            self.received = int(self._answer.get()[0])
        return self.received != 0
