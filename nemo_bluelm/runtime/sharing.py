"""One loader for all ranks of a model copy: it sends tiles to its tensor and context ranks, the text to every rank.

Samples are read by the first tensor and context rank of the first pipeline stage. When a step uses them, each of its
peers of that stage gets the tiles that it works on, from device to device. Everything else of a pack goes to the other
ranks through the job's key-value store when the pack is loaded: what a sample turned out to be, good or bad, is then
the same on all of them. No collective does it, because pipeline stages ask for a micro-batch at different times and
would wait for each other for ever.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch
from megatron.core import parallel_state
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from nemo_bluelm.data.packs import PackedBatch, to_device
from nemo_bluelm.layers.context import on_device
from nemo_bluelm.layers.tile_shares import balance
from nemo_bluelm.model.bluelm import BlueLMModel

_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.1  # seconds between two looks into the store
_GIVE_UP = 1800.0  # seconds, as long as a collective waits
_FAILED = "failed"


def loads() -> bool:
    """Whether this rank loads the packs of its model copy."""
    first_stage = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    return first_stage and parallel_state.get_tensor_and_context_parallel_rank() == 0


def share_tiles(batch: PackedBatch, device: torch.device, split: bool) -> PackedBatch:
    """The batch with the tiles that this rank of the first pipeline stage works on, on its device.

    Tiles cost the same, so they are split evenly. Even two tiles pay: one rank's wait for its peer is never longer than
    its own work on the other tile would be.

    Args:
        batch: with all tiles on the rank that loads, "meta" tiles of the same shape on the others.
        split: give each tensor and context rank its share; otherwise every one gets all.
    """
    tiles, ranks = batch.tiles, parallel_state.get_tensor_and_context_parallel_world_size()
    if ranks == 1 or not len(tiles):
        return replace(
            batch, tiles=tiles.new_empty(tiles.shape, device=device) if tiles.is_meta else to_device(tiles, device)
        )
    group = parallel_state.get_tensor_and_context_parallel_group()
    if not split:
        tiles = torch.empty_like(tiles, device=device) if tiles.is_meta else to_device(tiles, device)
        torch.distributed.broadcast(tiles, torch.distributed.get_global_rank(group, 0), group=group)
        return replace(batch, tiles=tiles)
    shares = balance([1.0] * len(tiles), ranks)
    sent, mine = [0] * ranks, len(shares[group.rank()])
    if tiles.is_meta:
        all_tiles = torch.empty(0, *tiles.shape[1:], dtype=tiles.dtype, device=device)
    else:
        sent = [len(share) for share in shares]
        order = on_device([tile for share in shares for tile in share], torch.int64, device)
        all_tiles = to_device(tiles, device).index_select(0, order)
    received = torch.empty(mine, *tiles.shape[1:], dtype=tiles.dtype, device=device)
    torch.distributed.all_to_all_single(received, all_tiles, [mine] + [0] * (ranks - 1), sent, group=group)
    return replace(batch, tiles=received, shares=shares)


def sum_tile_gradients(chunks: Sequence[torch.nn.Module]) -> None:
    """Sum the gradients of ViT and projector over tensor-parallel ranks, each of which worked on other tiles.

    Call it where :func:`share_tiles` splits, once a step, when gradients have been reduced over data-parallel ranks
    (of a distributed optimizer, only this rank's shard is of use; its peers have the same).

    Args:
        chunks: the DistributedDataParallel modules of this rank.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    models = [part for chunk in chunks for part in chunk.modules() if isinstance(part, BlueLMModel)]
    parts = [part for model in models if model.pre_process for part in (model.vision, model.projector)]
    weights = [weight for part in parts for weight in part.parameters() if weight.requires_grad]
    if weights:
        with torch.distributed._coalescing_manager(group):
            for weight in weights:
                torch.distributed.all_reduce(weight.main_grad, group=group)


class Texts:
    """The packs without their pixels, from the rank that loads them to the others of its model copy."""

    def __init__(self, store: Store, keep: int):
        """``keep``: packs that remain in the store; at least as many as the ranks of a model copy can be apart."""
        self._store, self._keep = store, keep
        self._told: deque[int] = deque()

    @classmethod
    def of_this_job(cls, keep: int) -> "Texts":
        """Packs have numbers that are unique in the job, so the model copies need no names."""
        return cls(PrefixStore("nemo_bluelm/packs", _get_default_store()), keep)

    def tell(self, pack: int, text: bytes) -> None:
        """Safe to call from several threads."""
        self._store.set(str(pack), text)
        self._told.append(pack)
        if len(self._told) > self._keep:
            self._store.delete_key(str(self._told.popleft()))

    def fail(self) -> None:
        """Nothing more will be told: whoever waits shall not wait for ever."""
        self._store.set(_FAILED, "")

    def wait(self, pack: int) -> bytes:
        """
        Raises:
            RuntimeError: a rank that loads packs has failed, or told nothing of this one in half an hour.
        """
        # Store.get holds the store's lock while it waits, and would stop whatever else in the process needs the store.
        key, pause, end = str(pack), _FIRST_PAUSE, time.monotonic() + _GIVE_UP
        while not self._store.check([key]):
            if self._store.check([_FAILED]) or time.monotonic() > end:
                raise RuntimeError(f"pack {pack} was not loaded by the rank that reads it")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return self._store.get(key)
