"""Ctrl-C and SIGTERM end a run after the current step, with a checkpoint."""

import os
import signal

import torch
from lightning.pytorch import Callback, Trainer

from nemo_bluelm.runtime.checkpoints import Checkpoints

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(Callback):
    """All ranks agree after every step whether one of them was asked to stop; a second signal stops at once."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self.received = 0  # signal number; 0 is none
        self._previous = {}

    def _note(self, number: int, frame) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number

    def on_train_start(self, *args) -> None:
        self._previous = {sig: signal.signal(sig, self._note) for sig in SIGNALS}

    def on_train_batch_end(self, trainer: Trainer, module, *args) -> None:
        wanted = torch.tensor(self.received, device=module.device)
        torch.distributed.all_reduce(wanted, op=torch.distributed.ReduceOp.MAX)
        if wanted:
            self.received = int(wanted)
            self.checkpoints.save(trainer)
            trainer.should_stop = True

    def on_train_end(self, *args) -> None:
        for sig, handler in self._previous.items():
            signal.signal(sig, handler)
