"""How a run saves its checkpoints: beside the training, published by rename, so that one that can be seen is whole."""

import contextlib
import os
import shutil
from pathlib import Path
from threading import Thread
from typing import Optional

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from megatron.core import parallel_state

from nemo_bluelm.runtime.checksums import CHECKSUMS_FILE, checksums, files_in, write_checksums
from nemo_bluelm.runtime.later import Later, to_device
from nemo_bluelm.runtime.run_dir import WEIGHTS_DIR, checkpoint_path, published, step_of
from nemo_bluelm.runtime.saving import HostCopy, Writing

_REHEARSAL = ".step_0.partial"
_UNPUBLISHED = (".step_*.partial", ".step_*.deleting")  # what a killed run may leave


class Checkpoints(Callback):
    """Saves every ``save_every`` steps and at the end, publishes by rename, keeps the newest ``keep``.

    A checkpoint is copied to the host and written by a thread while training goes on; it is published after the first
    step that finds it written on all ranks, and before the next one is begun.

    Args:
        run_dir: the run's folder.
        files: small files that make a checkpoint complete (recipe, tokenizer), by the name they get in it.
        keep: newest checkpoints to keep; -1 keeps all, 0 none.
        keep_every: checkpoints of every so many steps are kept for good, too; 0 for none.
    """

    def __init__(self, run_dir: Path, files: dict[str, bytes], save_every: int, keep: int, keep_every: int = 0):
        self.run_dir, self.files = run_dir, files
        self.save_every, self.keep, self.keep_every = save_every, keep, keep_every
        self.protected: set[int] = set()  # steps whose checkpoints are kept however old they are
        self._copy = HostCopy()
        self._deleting: Optional[Thread] = None
        self._rehearsed = False
        self._step: Optional[int] = None  # of the last checkpoint that was begun
        self._writing: Optional[Writing] = None
        self._written: Optional[Later] = None  # whether it is, on all ranks

    def on_train_start(self, trainer: Trainer, *args) -> None:
        self._step = trainer.global_step or None  # the run goes on from that checkpoint
        if trainer.is_global_zero:
            for pattern in _UNPUBLISHED:
                for folder in (self.run_dir / "checkpoints").glob(pattern):
                    shutil.rmtree(folder, ignore_errors=True)
        if torch.cuda.is_available():
            self._copy.reserve(_state_bytes(trainer), on_gpu=True)
        torch.distributed.barrier()

    def on_before_optimizer_step(self, *args) -> None:
        if self._writing is not None:
            self._writing.copied.wait()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args) -> None:
        if self._written is not None and self._written.get()[0]:
            self._publish(trainer)
        if not self._rehearsed:
            self._rehearse(trainer)
        if trainer.global_step % self.save_every == 0:
            self.save(trainer)
        if self._writing is not None:
            written = to_device([not self._writing.is_alive()], module.device)
            torch.distributed.all_reduce(written, op=torch.distributed.ReduceOp.MIN)
            self._written = Later(written)

    def on_train_end(self, trainer: Trainer, *args) -> None:
        self.save(trainer)
        self._publish(trainer)
        if self._deleting is not None:
            self._deleting.join()

    def on_exception(self, trainer: Trainer, *args) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.join()
            # A part of a checkpoint is no use and may be what fills the disk.
            shutil.rmtree(writing.folder, ignore_errors=True)

    def save(self, trainer: Trainer) -> None:
        """Begin to write the state after ``trainer.global_step`` steps unless that is done already; for all ranks."""
        step = trainer.global_step
        if self._step == step:
            return
        final = checkpoint_path(self.run_dir, step)
        self._publish(trainer)
        partial = final.with_name(f".{final.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)  # by each rank, whoever comes first
        with _cleared_on_error(partial):
            trainer.save_checkpoint(partial)
            plan, talks = trainer.strategy.take_plan()
            self._writing = Writing(plan, talks, self._copy, partial)
        self._step = step

    def _rehearse(self, trainer: Trainer) -> None:
        """Plan a checkpoint twice and write none, in the first step, which is slow anyway; for all ranks.

        Once two plans were the same, ranks needn't talk to plan, and no checkpoint holds training up for that.
        """
        self._rehearsed = True
        folder = self.run_dir / "checkpoints" / _REHEARSAL
        with _cleared_on_error(folder):
            for _ in range(2):
                trainer.save_checkpoint(folder)
                plan, _ = trainer.strategy.take_plan()
                plan()
        torch.distributed.barrier()
        if trainer.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, trainer: Trainer) -> None:
        """Wait for the checkpoint that is being written, if there is one, and give it its name; for all ranks."""
        if self._writing is None:
            return
        writing, self._writing, self._written = self._writing, None, None
        partial = writing.folder
        with _cleared_on_error(partial):
            writing.finish()
            found = [None] * torch.distributed.get_world_size() if trainer.is_global_zero else None
            torch.distributed.gather_object(writing.checksums, found)
            if trainer.is_global_zero:
                known = {name: entry for of_rank in found for name, entry in of_rank.items()}
                for name, content in self.files.items():
                    (partial / name).write_bytes(content)
                others = [file for file in files_in(partial) if str(file.relative_to(partial)) not in known]
                write_checksums(partial, known | checksums(partial, others))
                final = partial.with_name(partial.name[1 : -len(".partial")])
                _sync(*others, partial / CHECKSUMS_FILE, partial / WEIGHTS_DIR, partial)
                os.replace(partial, final)
                _sync(final.parent)
                self._prune()
        torch.distributed.barrier()

    def _prune(self) -> None:
        if self.keep < 0:
            return
        doomed, folders = [], published(self.run_dir)
        for old in folders[: max(len(folders) - self.keep, 0)]:
            step = step_of(old)
            if step in self.protected or (self.keep_every and step % self.keep_every == 0):
                continue
            doomed.append(old.with_name(f".{old.name}.deleting"))
            os.replace(old, doomed[-1])
        self._deleting = Thread(target=_delete, args=(doomed, self._deleting))  # 40 GB take longer than a step
        self._deleting.start()


def _sync(*paths: Path) -> None:
    """Have files and folders on the disk, so that a power cut can't leave a checkpoint's name without its content."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _delete(folders: list[Path], after: Optional[Thread]) -> None:
    if after is not None:
        after.join()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _state_bytes(trainer: Trainer) -> int:
    """What this rank is going to write, about; data-parallel ranks share what they all have."""
    weights = sum(weight.nbytes for weight in trainer.strategy.megatron_parallel.parameters())
    main = sum(weight.numel() for weight in trainer.optimizers[0].mcore_optimizer.main_parameters())
    optimizer = 3 * 4 * main  # fp32 weights and Adam's two moments
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    sharded = trainer.strategy.ddp_config.use_distributed_optimizer
    return int(1.02 * (weights / ranks + (optimizer if sharded else optimizer / ranks)))


@contextlib.contextmanager
def _cleared_on_error(folder: Path):
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
