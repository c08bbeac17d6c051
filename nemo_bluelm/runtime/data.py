"""The packs of a run as a Lightning data module: which rank loads which pack, and where a resumed run goes on."""

from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import islice
from typing import Any

import lightning.pytorch as L
import torch
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.plugins.data_sampler import DataSampler
from torch.utils.data import DataLoader, IterableDataset

from nemo_bluelm.data.loader import LoadedPack, PackLoader, prefetch
from nemo_bluelm.data.packs import PackedBatch
from nemo_bluelm.data.plan import Pack
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.sharing import Holes, decodes


class RankPacks(IterableDataset):
    """The packs of one data-parallel rank, loaded ahead, without end.

    Every rank plans all packs, since planning is cheap, and loads its own: those of an optimizer step are dealt to the
    data-parallel ranks in turn, so a global batch holds the same packs in any layout.

    Args:
        loader: its plan stands at the first pack of the next step.
        global_batch_size: packs in an optimizer step, over all ranks.
        threads, ahead: as :func:`nemo_bluelm.data.loader.prefetch`.
    """

    def __init__(self, loader: PackLoader, global_batch_size: int, threads: int, ahead: int):
        self._loader, self._global_batch_size = loader, global_batch_size
        self._threads, self._ahead = threads, ahead
        self._states = {loader.plan.number: loader.plan.state()}

    def state(self, position: int) -> dict[str, Any]:
        """The plan's state when ``position`` packs, a whole number of steps, have been trained on.

        What is loaded ahead doesn't count. States before ``position`` are forgotten.
        """
        self._states = {number: state for number, state in self._states.items() if number >= position}
        return self._states[position]

    def __iter__(self) -> Iterator[PackedBatch]:
        """
        Raises:
            UserError: the sources end before the training does; too many bad samples.
        """
        for pack in prefetch(self._mine(), self._load(), self._threads, self._ahead):
            yield pack.batch
        raise UserError(
            f"the data ends after {self._loader.plan.number // self._global_batch_size} steps: every source has been "
            "gone through data.sources.NAME.max_epochs times; raise it, or lower train.steps"
        )

    def _mine(self) -> Iterator[Pack]:
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        plan = self._loader.plan
        while len(step := list(islice(plan, self._global_batch_size))) == self._global_batch_size:
            self._states[plan.number] = plan.state()
            yield from step[rank::ranks]

    def _load(self) -> Callable[[Pack], LoadedPack]:
        """How this rank loads a pack: with pixels, or as told by the rank of its model copy that has them."""
        loader = self._loader
        model_ranks = torch.distributed.get_world_size() // parallel_state.get_data_parallel_world_size()
        if model_ranks == 1:
            return loader.load
        # Ranks of a model copy meet at every optimizer step; beyond that only what is loaded ahead lies between them.
        holes = Holes.of_this_job(keep=2 * self._global_batch_size + self._ahead + self._threads)
        if not decodes():
            return lambda pack: loader.load_text(pack, holes.wait(pack.number))

        def load_and_tell(pack: Pack) -> LoadedPack:
            loaded = loader.load(pack)
            holes.tell(pack.number, loaded.holes)
            return loaded

        return load_and_tell


class PackStep(MegatronStep):
    """A step of fixed shape. NeMo's own asks two questions that only NeMo 1 samplers and its distillation need."""

    has_global_batch_sampler = False
    adjust_tensor_shapes_fn = None


class PackSampler(DataSampler):
    """Tells Megatron's schedule the shape of a step: one pack a micro-batch.

    Args:
        global_batch_size: packs in an optimizer step, over all ranks.
        sequence_length: tokens in a pack.
    """

    def __init__(self, global_batch_size: int, sequence_length: int):
        self.global_batch_size, self.sequence_length = global_batch_size, sequence_length

    def setup(self, global_rank: int) -> None:
        """Nothing to prepare: packs are a function of their position."""

    def transform_dataloader(self, dataloader: DataLoader, consumed_samples: int = 0) -> DataLoader:
        """The loader as it is: it already deals packs to ranks."""
        return dataloader

    def on_megatron_step_start(self, step: MegatronStep) -> PackStep:
        values = {field.name: getattr(step, field.name) for field in fields(step)}
        values["micro_batch_size"] = 1
        values["num_microbatches"] = self.global_batch_size // parallel_state.get_data_parallel_world_size()
        values["seq_length"] = self.sequence_length
        return PackStep(**values)


class PackDataModule(L.LightningDataModule):
    """The packs of a run; a resumed run goes on at the first pack that no optimizer step has used.

    Args:
        loader: of the packs.
        global_batch_size: packs in an optimizer step, over all ranks.
        threads, ahead: as :func:`nemo_bluelm.data.loader.prefetch`.
    """

    def __init__(self, loader: PackLoader, global_batch_size: int, threads: int, ahead: int):
        super().__init__()
        self.loader = loader
        self._prefetch = threads, ahead
        self.data_sampler = PackSampler(global_batch_size, loader.plan.sequence_length)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: the plan's state after the packs of all finished steps."""
        return self._packs.state(self.trainer.global_step * self.data_sampler.global_batch_size)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            UserError: the packs after this checkpoint would not be the ones of the run that wrote it.
        """
        self.loader.plan.restore(state)

    def train_dataloader(self) -> DataLoader:
        self._packs = RankPacks(self.loader, self.data_sampler.global_batch_size, *self._prefetch)
        return DataLoader(self._packs, batch_size=None, num_workers=0)
