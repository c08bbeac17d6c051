"""A rank's part of a checkpoint on its way to the disk, while training goes on."""

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch import Tensor

from nemo_bluelm.runtime.checksums import Checksum, checksums

_ALIGNMENT = 256  # bytes, of a copied tensor
_TOUCHED_BY_A_THREAD = 2**28  # bytes at a time
_TOUCHING_THREADS = 8
_COPIES_IN_QUEUE = 32


class HostCopy:
    """The state of this rank in host memory, which every checkpoint uses again.

    On a GPU the memory is page-locked, and the thread that writes makes the copy, beside the kernels of the next step:
    forward and backward passes only read weights and optimizer state, and :meth:`wait` holds the next update back.
    """

    def __init__(self):
        self._memory: Optional[np.ndarray] = None  # bytes
        self._stream: Optional[torch.cuda.Stream] = None
        self._waiting: list[tuple[Tensor, Tensor]] = []  # copies to make, and of what
        self._ready: Optional[torch.cuda.Event] = None  # the GPU has come to the state that is copied
        self._made: Optional[threading.Event] = None  # all copies are

    def reserve(self, size: int, on_gpu: bool) -> None:
        """Have memory for ``size`` bytes; locking the pages of 40 GB takes seconds, so do it before the training."""
        if self._memory is not None and self._memory.size >= size:
            return
        self._release()
        self._memory = np.empty(size, np.uint8)
        if on_gpu:
            # Not by PyTorch's allocator of pinned memory, which rounds every tensor up to a power of two.
            parts = torch.from_numpy(self._memory).split(_TOUCHED_BY_A_THREAD)
            with ThreadPoolExecutor(_TOUCHING_THREADS) as threads:
                list(threads.map(Tensor.zero_, parts))  # the kernel maps pages one by one as they are touched
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._memory.ctypes.data, size, 0))
            self._stream = torch.cuda.Stream()

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Where the copies are once :meth:`make` has made them; those of tensors on a CPU are there already."""
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        starts = [0, *accumulate(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors)]
        self.reserve(starts[-1], on_gpu)
        # Slices of an array become tensors with storages of their own; of a view, all that it is a view of is written.
        parts = [self._memory[start : start + tensor.nbytes] for start, tensor in zip(starts, tensors)]
        copies = [torch.from_numpy(part).view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors)]
        if on_gpu:
            self._waiting = list(zip(copies, tensors))
            self._made = threading.Event()
            self._ready = torch.cuda.Event()
            self._ready.record()
        else:
            for copy, tensor in zip(copies, tensors):
                copy.copy_(tensor)
        return copies

    def make(self) -> None:
        """Make the copies; by the thread that writes; the GPU's queue has no room for all of them at once."""
        if not self._waiting:
            return
        try:
            self._ready.synchronize()
            with torch.cuda.stream(self._stream):
                for number, (copy, tensor) in enumerate(self._waiting, 1):
                    copy.copy_(tensor, non_blocking=True)
                    if number % _COPIES_IN_QUEUE == 0:
                        self._stream.synchronize()
                self._stream.synchronize()
        finally:
            self._waiting = []
            self._made.set()

    def wait(self) -> None:
        """Until the copies are made: before what is copied may change."""
        if self._made is not None:
            self._made.wait()

    def _release(self) -> None:
        if self._stream is not None:
            torch.cuda.cudart().cudaHostUnregister(self._memory.ctypes.data)
        self._memory = None  # before more is taken, as there may be no room for both


class Writing(threading.Thread):
    """Writes what Megatron-Core planned to write, then reads it again for its checksums.

    In a thread and not, as Megatron-Core does, in a forked process: a process that uses a GPU can't be forked safely,
    and writing files lets other threads run.

    Args:
        request: what ``dist_checkpointing.save(..., async_sharded_save=True)`` returned.
        copy: takes the tensors; not in use by another.
        folder: of the checkpoint.

    Attributes:
        checksums: of the files that it wrote, by their path in ``folder``; when it has ended.
    """

    def __init__(self, request: AsyncRequest, copy: HostCopy, folder: Path):
        super().__init__(name="checkpoint", daemon=True)
        self.folder, self._copy, self._request = folder, copy, request
        self.checksums: dict[str, Checksum] = {}
        self._buckets: list[tuple] = []
        if request.async_fn is not None:  # the rank has something to write
            (self._transforms, _), (_, buckets, self._results) = request.async_fn.args, request.async_fn_args
            copies = iter(copy.take([tensor for *_, (_, tensors) in buckets for _, tensor in tensors]))
            self._buckets = [
                (path, name, (other, [(item, next(copies)) for item, _ in tensors]))
                for path, name, (other, tensors) in buckets
            ]
        self.start()

    def run(self) -> None:
        if not self._buckets:
            return
        results: dict[int, Any] | Exception
        try:
            self._copy.make()
            with ThreadPoolExecutor(len(self._buckets)) as threads:
                results = dict(enumerate(threads.map(self._write, range(len(self._buckets)))))
                self.checksums = checksums(self.folder, [Path(path) for path, *_ in self._buckets])
        except Exception as error:
            results = error
        self._results.put(results)  # where the request's first finalizing function looks

    def _write(self, number: int) -> list:
        """Write one file; returns Megatron-Core's notes of what is where in it."""
        results, counts = queue.SimpleQueue(), queue.Queue()
        counts.put(number)
        FileSystemWriterAsync.write_preloaded_data(
            self._transforms, number, self._buckets[number], results, counts, use_fsync=True
        )
        _, found = results.get()
        if isinstance(found, Exception):
            raise found
        return found

    def finish(self) -> None:
        """Wait for it and write the metadata; all ranks must call it, on the training thread.

        Raises:
            CheckpointException: a rank couldn't write.
        """
        self.join()
        for function in self._request.finalize_fns:
            function()
