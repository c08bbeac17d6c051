"""How a run saves its checkpoints: published by rename, so that one that can be seen is whole."""

import os
import shutil
from pathlib import Path
from typing import Optional

import torch
from lightning.pytorch import Callback, Trainer

from nemo_bluelm.runtime.run_dir import checkpoint_path, published, step_of


class Checkpoints(Callback):
    """Saves every ``save_every`` steps and at the end, publishes by rename, keeps the newest ``keep``.

    Args:
        run_dir: the run's folder.
        files: small files that make a checkpoint complete (recipe, tokenizer), by the name they get in it.
        keep: checkpoints to keep; -1 keeps all.
    """

    def __init__(self, run_dir: Path, files: dict[str, bytes], save_every: int, keep: int):
        self.run_dir, self.files, self.save_every, self.keep = run_dir, files, save_every, keep
        self.last_saved: Optional[int] = None
        self.protected: set[int] = set()  # steps whose checkpoints are kept however old they are

    def on_train_batch_end(self, trainer: Trainer, *args) -> None:
        if trainer.global_step % self.save_every == 0:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, *args) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write the state after ``trainer.global_step`` steps unless that is done already; all ranks must call it."""
        step = trainer.global_step
        final = checkpoint_path(self.run_dir, step)
        if self.last_saved == step or final.exists():
            return
        partial = final.with_name(f".{final.name}.partial")
        try:
            if trainer.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            torch.distributed.barrier()
            trainer.save_checkpoint(partial)
            torch.distributed.barrier()
            if trainer.is_global_zero:
                for name, content in self.files.items():
                    (partial / name).write_bytes(content)
                os.replace(partial, final)
                self._prune()
        except BaseException:
            shutil.rmtree(
                partial, ignore_errors=True
            )  # a part of a checkpoint is no use and may be what fills the disk
            raise
        torch.distributed.barrier()
        self.last_saved = step

    def _prune(self) -> None:
        if self.keep > 0:
            for old in published(self.run_dir)[: -self.keep]:
                if step_of(old) in self.protected:
                    continue
                doomed = old.with_name(f".{old.name}.deleting")
                os.replace(old, doomed)
                shutil.rmtree(doomed, ignore_errors=True)
