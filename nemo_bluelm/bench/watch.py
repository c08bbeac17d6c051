"""A Lightning callback beside ``Metrics``: waiting for data, the profile of a step, what the rank holds."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from nemo_bluelm.bench.profile import Profile
from nemo_bluelm.config.schema import Part
from nemo_bluelm.data.packs import PackedBatch


class Watch(Callback):
    """
    Args:
        last_step: of the run.
        profile: write the kernels of the last step there.

    Attributes:
        waited: seconds of every step in which the training thread stood in the loader. The GPU may still have had work
            then, so this is the most that it can have waited.
        parameters: of this rank, by part.
    """

    def __init__(self, last_step: int, profile: Path | None = None):
        self._last_step, self._profile = last_step, Profile(profile) if profile else None
        self._waiting = 0.0
        self.waited: list[float] = []

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        data, original = trainer.datamodule, trainer.datamodule.train_dataloader
        data.train_dataloader = lambda: DataLoader(_Fed(original().dataset, self._wait), batch_size=None, num_workers=0)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.parameters = {part.value: 0 for part in Part}
        for name, weight in module.named_parameters():
            part = next(word for word in name.split(".") if word in self.parameters)
            self.parameters[part] += weight.numel()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *args) -> None:
        if self._profile and trainer.global_step == self._last_step - 1:
            self._profile.start()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args) -> None:
        self.waited.append(self._waiting)
        self._waiting = 0.0
        if self._profile and trainer.global_step == self._last_step:
            self._profile.finish(write=trainer.is_global_zero)

    def _wait(self, seconds: float) -> None:
        self._waiting += seconds


class _Fed(IterableDataset):
    """The packs of a dataset; ``tell`` hears how long each took to come."""

    def __init__(self, packs: IterableDataset, tell: Callable[[float], None]):
        self._packs, self._tell = packs, tell

    def __iter__(self) -> Iterator[PackedBatch]:
        with closing(iter(self._packs)) as batches:
            while True:
                started = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    return
                self._tell(time.perf_counter() - started)
                yield batch
