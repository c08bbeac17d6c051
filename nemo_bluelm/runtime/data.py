"""The stream of packs as a Lightning data module: which rank takes which pack, and where a resumed run goes on."""

from collections.abc import Iterator
from dataclasses import fields

import lightning.pytorch as L
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.plugins.data_sampler import DataSampler
from torch.utils.data import DataLoader, IterableDataset

from nemo_bluelm.data.packs import PackedBatch
from nemo_bluelm.data.stream import PackStream
from nemo_bluelm.errors import UserError


class RankPacks(IterableDataset):
    """The packs of one data-parallel rank, from a global position on, without end.

    The packs of an optimizer step are dealt to the data-parallel ranks in turn, so a global batch holds the same
    packs in any layout.
    """

    def __init__(self, stream: PackStream, position: int, rank: int, ranks: int):
        self.stream, self.position, self.rank, self.ranks = stream, position, rank, ranks

    def __iter__(self) -> Iterator[PackedBatch]:
        index = self.position + self.rank
        while True:
            yield self.stream[index]
            index += self.ranks


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
    """The packs of a run; a resumed run goes on at the first pack that no optimizer step has used."""

    def __init__(self, stream: PackStream, global_batch_size: int, sequence_length: int):
        super().__init__()
        self.stream = stream
        self.data_sampler = PackSampler(global_batch_size, sequence_length)

    def state_dict(self) -> dict[str, str]:
        """What a checkpoint keeps of the data; the position follows from the step."""
        return {"fingerprint": self.stream.fingerprint}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """
        Raises:
            UserError: the packs after this checkpoint would not be the ones of the run that wrote it.
        """
        if state["fingerprint"] != self.stream.fingerprint:
            raise UserError(
                "the shards or the tokenizer in data.root changed since the checkpoint was written; "
                "restore them, or choose another run_dir to start afresh"
            )

    def train_dataloader(self) -> DataLoader:
        dataset = RankPacks(
            self.stream,
            position=self.trainer.global_step * self.data_sampler.global_batch_size,
            rank=parallel_state.get_data_parallel_rank(),
            ranks=parallel_state.get_data_parallel_world_size(),
        )
        return DataLoader(dataset, batch_size=None, num_workers=0)
