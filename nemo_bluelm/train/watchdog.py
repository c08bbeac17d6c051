"""Ends a rank that makes no progress, after it has written down where every thread stands."""

import faulthandler
import os
import sys
import threading
from pathlib import Path
from typing import Optional

from lightning.pytorch import Callback, Trainer

from nemo_bluelm.train.events import note

STACKS_DIR = "stacks"  # in the run folder: rank_N.txt
EXIT_CODE = 75  # EX_TEMPFAIL: started again it may work


class Watchdog(Callback):
    """A rank waits for ever for one that is stuck; launchers only see that processes are there.

    Args:
        run_dir: gets ``stacks/rank_N.txt`` of each rank.
        seconds: that a step may take, with what comes between two of them.
    """

    def __init__(self, run_dir: Path, name: str, seconds: float):
        self.run_dir, self.name, self.seconds = run_dir, name, seconds
        self._step = 0
        self._over = False
        self._alive: Optional[threading.Event] = None  # made late, as NeMo's trainer copies its callbacks

    def on_train_start(self, trainer: Trainer, *args) -> None:
        self._step, self._alive = trainer.global_step, threading.Event()
        threading.Thread(target=self._watch, args=(trainer.global_rank,), name="watchdog", daemon=True).start()

    def on_train_batch_end(self, trainer: Trainer, *args) -> None:
        self._step = trainer.global_step
        self._alive.set()

    def teardown(self, *args, **kwargs) -> None:
        self._over = True
        if self._alive is not None:
            self._alive.set()

    def _watch(self, rank: int) -> None:
        while self._alive.wait(self.seconds):
            self._alive.clear()
            if self._over:
                return
        file = self.run_dir / STACKS_DIR / f"rank_{rank}.txt"
        told = f"no step ended for {self.seconds:g} s after step {self._step}"
        try:
            file.parent.mkdir(exist_ok=True)
            with file.open("w") as stream:
                faulthandler.dump_traceback(stream, all_threads=True)
            note(self.run_dir, "hang", self._step, f"rank {rank}: {told}")
            told += f"; where its threads stood is in {file}"
        except OSError as error:  # what it waits for may be this disk
            told += f"; where its threads stood can't be written: {error.strerror}"
        print(f"{self.name}  rank {rank} is ended: {told}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)
