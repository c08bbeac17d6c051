"""One loader for all ranks of a model copy: it sends tiles to its tensor and context ranks, the text to every rank.

Samples are read by the first tensor and context rank of the first pipeline stage. Its peers of that stage get the tiles
by a broadcast on the device when a step uses them. Everything else of a pack goes to the other ranks through the job's
key-value store when the pack is loaded: what a sample turned out to be, good or bad, is then the same on all of them.
No collective does it, because pipeline stages ask for a micro-batch at different times and would wait for each other
for ever.
"""

import time
from collections import deque

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.1  # seconds between two looks into the store
_GIVE_UP = 1800.0  # seconds, as long as a collective waits
_FAILED = "failed"


def loads() -> bool:
    """Whether this rank loads the packs of its model copy."""
    first_stage = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    return first_stage and parallel_state.get_tensor_and_context_parallel_rank() == 0


def share_tiles(tiles: Tensor, device: torch.device) -> Tensor:
    """The tiles on this rank's device, on every tensor and context rank of the first pipeline stage.

    Args:
        tiles: uint8 [n, 3, T, T]; a "meta" tensor on the ranks that don't load.
    """
    tiles = torch.empty_like(tiles, device=device) if tiles.is_meta else tiles.to(device)
    if len(tiles) and parallel_state.get_tensor_and_context_parallel_world_size() > 1:
        group = parallel_state.get_tensor_and_context_parallel_group()
        torch.distributed.broadcast(tiles, torch.distributed.get_global_rank(group, 0), group=group)
    return tiles


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
