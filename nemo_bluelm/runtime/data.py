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

from nemo_bluelm.data.loader import PackLoader, prefetch
from nemo_bluelm.data.packs import PackedBatch, join
from nemo_bluelm.data.plan import Pack
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.sharing import Texts, loads


class RankPacks(IterableDataset):
    """The micro-batches of one data-parallel rank, loaded ahead, to the last whole step that the sources give.

    Every rank plans all packs, since planning is cheap, and loads its own: those of an optimizer step are dealt to the
    data-parallel ranks in turn, so a global batch holds the same packs in any layout. ``micro_batch_size`` of a rank's
    packs at a time are joined to a micro-batch.

    Args:
        loader: its plan stands at the first pack of the next step.
        global_batch_size: packs in an optimizer step, over all ranks.
        micro_batch_size: packs in a micro-batch; a rank's packs of a step are a multiple of it.
        threads, ahead: as :func:`nemo_bluelm.data.loader.prefetch`.
        at_end: called with the packs of all whole steps, once it is known that there are no more, which is before the
            last of them is delivered.
    """

    def __init__(
        self,
        loader: PackLoader,
        global_batch_size: int,
        micro_batch_size: int,
        threads: int,
        ahead: int,
        at_end: Callable[[int], None],
    ):
        self._loader, self._global_batch_size, self._micro_batch_size = loader, global_batch_size, micro_batch_size
        self._threads, self._ahead, self._at_end = threads, ahead, at_end
        self._states = {loader.plan.number: loader.plan.state()}

    def state(self, position: int) -> dict[str, Any]:
        """The plan's state when ``position`` packs, a whole number of steps, have been trained on.

        What is loaded ahead doesn't count.
        """
        return self._states[position]

    def __iter__(self) -> Iterator[PackedBatch]:
        """
        Raises:
            UserError: the sources don't give one whole step; too many bad samples.
        """
        ahead = -(-self._ahead // self._micro_batch_size)
        for number, batch in prefetch(self._micro_batches(), self._whole(self._load()), self._threads, ahead):
            # Training may still be in the step before the one whose packs it takes.
            past = number - 2 * self._global_batch_size
            self._states = {position: state for position, state in self._states.items() if position >= past}
            yield batch

    def _whole(self, load: Callable[[Pack], PackedBatch]) -> Callable[[list[Pack]], tuple[int, PackedBatch]]:
        """How a micro-batch is made ready for the device, on a loader thread: (number of its first pack, its row)."""

        def whole(packs: list[Pack]) -> tuple[int, PackedBatch]:
            batch = join([load(pack) for pack in packs])
            return packs[0].number, batch.pinned() if torch.cuda.is_available() else batch

        return whole

    def _micro_batches(self) -> Iterator[list[Pack]]:
        packs = self._mine()
        while micro_batch := list(islice(packs, self._micro_batch_size)):
            yield micro_batch

    def _mine(self) -> Iterator[Pack]:
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        plan, size = self._loader.plan, self._global_batch_size
        first, step = plan.number, list(islice(plan, size))
        if len(step) < size:
            raise UserError(
                f"the data gives no further step of train.global_batch_size {size} packs: every source has been gone "
                "through data.sources.NAME.max_epochs times; raise it in a new run_dir"
            )
        while len(step) == size:
            position = first + size
            self._states[position] = plan.state()
            following = list(islice(plan, size))
            if len(following) < size:
                self._at_end(position)
            yield from step[rank::ranks]
            first, step = position, following

    def _load(self) -> Callable[[Pack], PackedBatch]:
        """How this rank gets a pack: it reads it, or is told by the rank of its model copy that does."""
        loader = self._loader
        model_ranks = torch.distributed.get_world_size() // parallel_state.get_data_parallel_world_size()
        if model_ranks == 1:
            return lambda pack: loader.load(pack).batch
        # Ranks of a model copy meet at every optimizer step; beyond that only what is loaded ahead lies between them.
        loaded_ahead = self._ahead + self._micro_batch_size * (self._threads + 1)
        texts = Texts.of_this_job(keep=2 * self._global_batch_size + loaded_ahead)
        if not loads():
            return lambda pack: PackedBatch.text_from_bytes(texts.wait(pack.number))

        def load_and_tell(pack: Pack) -> PackedBatch:
            try:
                batch = loader.load(pack).batch
            except BaseException:
                texts.fail()
                raise
            texts.tell(pack.number, batch.text_to_bytes())
            return batch

        return load_and_tell


class PackStep(MegatronStep):
    """A step of fixed shape. NeMo's own asks two questions that only NeMo 1 samplers and its distillation need."""

    has_global_batch_sampler = False
    adjust_tensor_shapes_fn = None


class PackSampler(DataSampler):
    """Tells Megatron's schedule the shape of a step: a micro-batch is one row, however many packs lie in it.

    Args:
        global_batch_size: packs in an optimizer step, over all ranks.
        micro_batch_size: packs in a micro-batch.
        sequence_length: tokens in a pack.
    """

    def __init__(self, global_batch_size: int, micro_batch_size: int, sequence_length: int):
        self.global_batch_size, self.sequence_length = global_batch_size, sequence_length
        self.micro_batch_size = micro_batch_size

    def setup(self, global_rank: int) -> None:
        """Nothing to prepare: packs are a function of their position."""

    def transform_dataloader(self, dataloader: DataLoader, consumed_samples: int = 0) -> DataLoader:
        """The loader as it is: it already deals packs to ranks."""
        return dataloader

    def on_megatron_step_start(self, step: MegatronStep) -> PackStep:
        values = {field.name: getattr(step, field.name) for field in fields(step)}
        packs = self.global_batch_size // parallel_state.get_data_parallel_world_size()
        values["micro_batch_size"] = 1  # rows
        values["num_microbatches"] = packs // self.micro_batch_size
        values["seq_length"] = self.sequence_length * self.micro_batch_size
        return PackStep(**values)


class PackDataModule(L.LightningDataModule):
    """The packs of a run; a resumed run goes on at the first pack that no optimizer step has used.

    Args:
        loader: of the packs.
        global_batch_size: packs in an optimizer step, over all ranks.
        micro_batch_size: packs in a micro-batch.
        threads, ahead: as :func:`nemo_bluelm.data.loader.prefetch`.
    """

    def __init__(self, loader: PackLoader, global_batch_size: int, micro_batch_size: int, threads: int, ahead: int):
        super().__init__()
        self.loader = loader
        self._prefetch = threads, ahead
        self.data_sampler = PackSampler(global_batch_size, micro_batch_size, loader.plan.sequence_length)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: the plan's state after the packs of all finished steps."""
        return self._packs.state(self.trainer.global_step * self.data_sampler.global_batch_size)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            UserError: the packs after this checkpoint would not be the ones of the run that wrote it.
        """
        self.loader.plan.restore(state)

    @property
    def bad_samples(self) -> int:
        """Those that this rank has met."""
        return self.loader.bad_samples

    def tokens_by_source(self) -> dict[str, int]:
        """Real tokens that the run has trained on up to the end of the last step, bad samples' planned ones included.

        Part of the plan's state, so a resumed run counts on.
        """
        return {name: source["tokens"] for name, source in self.state_dict()["sources"].items()}

    def train_dataloader(self) -> DataLoader:
        sizes = self.data_sampler.global_batch_size, self.data_sampler.micro_batch_size
        self._packs = RankPacks(self.loader, *sizes, *self._prefetch, self._end_at)
        return DataLoader(self._packs, batch_size=None, num_workers=0)

    def _end_at(self, packs: int) -> None:
        """Training ends with the data, as it does with its last step: with a checkpoint."""
        loop = self.trainer.fit_loop.epoch_loop
        loop.max_steps = min(loop.max_steps, packs // self.data_sampler.global_batch_size)
