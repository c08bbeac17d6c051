"""The weights of our checkpoints, read and written a piece at a time.

Megatron-Core saves and loads whole state dicts. Its format is PyTorch's distributed checkpoint and two small files.
"""

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Optional

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemo_bluelm.convert.table import count_bytes
from nemo_bluelm.runtime.run_dir import WEIGHTS_DIR
from nemo_bluelm.runtime.single import STATE_PREFIX
from nemo_bluelm.runtime.storage import reading

FILE_BYTES = 256 * 2**20  # PyTorch's writer holds what goes into a file until it is closed


class Piece(NamedTuple):
    """Rows of a checkpoint's tensor, or one of its stacked layers.

    Attributes:
        whole: shape of the tensor.
        offset: of the piece in it.
        shape: of the piece, with as many axes.
        read: gives it, of that many elements.
    """

    name: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def write_weights(folder: Path, pieces: Iterable[Piece], states: Iterable[str]) -> None:
    """Write the weights of a checkpoint, as Megatron-Core would from one rank.

    Args:
        folder: empty.
        pieces: every tensor, whole.
        states: keys of the layers' states, which are None.

    Raises:
        OSError: the disk is full, say.
    """
    data = {(STATE_PREFIX + piece.name, torch.Size(piece.offset)): piece for piece in pieces}
    plans, size = [SavePlan([WriteItem(MetadataIndex(STATE_PREFIX + key), WriteItemType.BYTE_IO) for key in states])], 0
    for (name, offset), piece in data.items():
        size += count_bytes(piece.shape, piece.dtype)
        if size > FILE_BYTES:
            plans.append(SavePlan([]))
            size = count_bytes(piece.shape, piece.dtype)
        chunk = ChunkStorageMetadata(offset, torch.Size(piece.shape))
        extent = TensorWriteData(chunk, TensorProperties(dtype=piece.dtype), torch.Size(piece.whole))
        plans[-1].items.append(WriteItem(MetadataIndex(name, offset), WriteItemType.SHARD, tensor_data=extent))
    writer, resolver = FileSystemWriter(folder), _Resolver(data)
    plans, metadata = create_default_global_save_plan([plan for plan in plans if plan.items])
    writer.set_up_storage_writer(is_coordinator=True)
    plans = writer.prepare_global_plan(plans)
    try:
        results = [writer.write_data(plan, resolver).wait() for plan in plans]
    except RuntimeError as error:
        # PyTorch closes a file that couldn't be written, which fails too and hides the reason.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise
    writer.finish(metadata, results)
    # As NeMo's: a pipeline's rank that loads no tensor of these gets its empty state from here.
    torch.save({"state_dict": {}}, folder / COMMON_STATE_FNAME)
    save_config(CheckpointingConfig("torch_dist"), str(folder))


class _Resolver:
    """The part of a ``SavePlanner`` that the writer asks."""

    def __init__(self, data: dict[tuple[str, torch.Size], Piece]):
        self._data = data

    def resolve_data(self, item: WriteItem) -> Tensor | io.BytesIO:
        if item.type is WriteItemType.BYTE_IO:
            torch.save([None], content := io.BytesIO())
            return content
        piece = self._data[item.index.fqn, item.index.offset]
        return piece.read().view(piece.shape)


class Weights:
    """The model's tensors in a checkpoint of any layout.

    Attributes:
        tensors: what is stored of each, by name.

    Raises:
        UserError: the list of tensors can't be read.
    """

    def __init__(self, checkpoint: Path):
        self._checkpoint = checkpoint
        self._reader = FileSystemReader(checkpoint / WEIGHTS_DIR)
        with reading(checkpoint):
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.tensors: dict[str, TensorStorageMetadata] = {
            name.removeprefix(STATE_PREFIX): stored
            for name, stored in metadata.state_dict_metadata.items()
            if name.startswith(STATE_PREFIX) and isinstance(stored, TensorStorageMetadata)
        }

    def read(self, name: str, layer: Optional[int] = None) -> Tensor:
        """A tensor, or one layer of a stacked one.

        Raises:
            UserError: it can't be read.
        """
        stored = self.tensors[name]
        offset, shape = [0] * len(stored.size), list(stored.size)
        if layer is not None:
            offset[0], shape[0] = layer, 1
        result = torch.empty(shape, dtype=stored.properties.dtype)
        wanted = [ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))]
        with reading(self._checkpoint):
            items = create_read_items_for_chunk_list(STATE_PREFIX + name, stored, wanted)
            self._reader.read_data(LoadPlan(items), _Destination(result)).wait()
        return result if layer is None else result[0]


class _Destination:
    """The part of a ``LoadPlanner`` that the reader asks."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        place = tuple(slice(start, start + size) for start, size in zip(item.dest_offsets, item.lengths))
        return self._tensor[place]

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        """It was copied into place."""
