"""Checkpoints of a run: where they lie, how one is published, which one to go on from."""

import os
import shutil
from pathlib import Path
from typing import Optional

import torch
from lightning.pytorch import Callback, Trainer

from nemo_bluelm.errors import UserError

PREFIX = "step_"
RECIPE_FILE, TOKENIZER_FILE = "recipe.yaml", "tokenizer.json"  # beside "weights" in every checkpoint


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done when the checkpoint was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def published(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. A folder has its name only once everything in it is written."""
    return sorted(checkpoints_dir(run_dir).glob(f"{PREFIX}[0-9]*"), key=step_of)


def resolve_checkpoint(path: str, key: str) -> Path:
    """The checkpoint that a run folder (its newest) or a checkpoint folder names.

    Raises:
        UserError: there is none; ``key`` is the recipe key or flag to name.
    """
    folder = Path(path)
    if (folder / "weights").is_dir():
        return folder.resolve()
    found = published(folder)
    if not found:
        what = "has no checkpoint" if folder.is_dir() else "does not exist"
        raise UserError(f"{key} is {path}, which {what}; give a run folder or one of its checkpoints/{PREFIX}* folders")
    return found[-1].resolve()


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

    def on_train_batch_end(self, trainer: Trainer, *args) -> None:
        if trainer.global_step % self.save_every == 0:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, *args) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write the state after ``trainer.global_step`` steps unless that is done already; all ranks must call it."""
        step = trainer.global_step
        final = checkpoints_dir(self.run_dir) / f"{PREFIX}{step:08d}"
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
        except OSError as error:
            raise UserError(
                f"can't write checkpoint {final}: {error.strerror or error}; free space or set run_dir to a writable folder"
            ) from error
        torch.distributed.barrier()
        self.last_saved = step

    def _prune(self) -> None:
        if self.keep > 0:
            for old in published(self.run_dir)[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
