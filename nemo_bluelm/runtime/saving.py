"""A rank's part of a checkpoint on its way to the disk, while training goes on."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Optional

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

    On a GPU the memory is page-locked, and the copy is made beside the kernels of the next step.
    """

    def __init__(self):
        self._memory: Optional[np.ndarray] = None  # bytes
        self._stream: Optional[torch.cuda.Stream] = None
        self._ready: Optional[torch.cuda.Event] = None

    def reserve(self, size: int, on_gpu: bool) -> None:
        """Have memory for ``size`` bytes; locking the pages of 40 GB takes seconds, so do it before the training."""
        if self._memory is not None and self._memory.size >= size:
            return
        if self._stream is not None:
            torch.cuda.cudart().cudaHostUnregister(self._memory.ctypes.data)
        self._memory = None  # first, as there may be no room for both
        self._memory = np.empty(size, np.uint8)
        if on_gpu:
            # Not by PyTorch's allocator of pinned memory, which rounds every tensor up to a power of two.
            parts = torch.from_numpy(self._memory).split(_TOUCHED_BY_A_THREAD)
            with ThreadPoolExecutor(_TOUCHING_THREADS) as threads:
                list(threads.map(Tensor.zero_, parts))  # the kernel maps pages one by one as they are touched
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._memory.ctypes.data, size, 0))
            self._stream = torch.cuda.Stream()

    def mark(self) -> None:
        """What has been queued on the GPU until now gives the state that is going to be copied."""
        if torch.cuda.is_available():
            self._ready = torch.cuda.Event()
            self._ready.record()

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of tensors, made when this returns; not for the thread that trains, as it waits for the GPU."""
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        starts = [0, *accumulate(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors)]
        self.reserve(starts[-1], on_gpu)
        # Slices of an array become tensors with storages of their own; of a view, all that it is a view of is written.
        parts = [self._memory[start : start + tensor.nbytes] for start, tensor in zip(starts, tensors)]
        copies = [torch.from_numpy(part).view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors)]
        if on_gpu:
            self._ready.synchronize()
        with torch.cuda.stream(self._stream) if on_gpu else nullcontext():
            for number, (copy, tensor) in enumerate(zip(copies, tensors), 1):
                copy.copy_(tensor, non_blocking=on_gpu)
                # The GPU's queue has no room for all of them; the thread that trains would find it full.
                if on_gpu and (number % _COPIES_IN_QUEUE == 0 or number == len(copies)):
                    self._stream.synchronize()
        return copies


class Writing(threading.Thread):
    """Plans what this rank writes, copies it to the host, writes it, then reads it again for its checksums.

    In a thread and not, as Megatron-Core does, in a forked process: a process that uses a GPU can't be forked safely,
    and copying and writing let other threads run. Forward and backward passes only read weights and optimizer state;
    the next update must wait for :attr:`copied`.

    Args:
        plan: gives what ``dist_checkpointing.save(..., async_sharded_save=True)`` returns.
        talks: whether the ranks talk to each other in ``plan``; then it is called at once, on the training thread.
        copy: takes the tensors; not in use by another.
        folder: of the checkpoint.

    Attributes:
        copied: set when the state may change.
        checksums: of the files that it wrote, by their path in ``folder``; when it has ended.
    """

    def __init__(self, plan: Callable[[], AsyncRequest], talks: bool, copy: HostCopy, folder: Path):
        super().__init__(name="checkpoint", daemon=True)
        self.folder, self._copy, self._plan = folder, copy, plan
        self.copied = threading.Event()
        self.checksums: dict[str, Checksum] = {}
        self._error: Optional[Exception] = None
        self._request = plan() if talks else None
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        copy.mark()
        self.start()

    def run(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # each thread begins with the first
            if self._request is None:
                self._request = self._plan()
            if self._request.async_fn is None:
                return  # nothing to write on this rank
            (self._transforms, _), (_, buckets, results) = self._request.async_fn.args, self._request.async_fn_args
            copies = iter(self._copy.copy([tensor for *_, (_, tensors) in buckets for _, tensor in tensors]))
        except Exception as error:
            self._error = error
            return
        finally:
            self.copied.set()
        files = [
            (path, name, (other, [(item, next(copies)) for item, _ in tensors]))
            for path, name, (other, tensors) in buckets
        ]
        try:
            with ThreadPoolExecutor(len(files)) as threads:
                written = dict(enumerate(threads.map(self._write, range(len(files)), files)))
            self.checksums = checksums(self.folder, [Path(path) for path, *_ in files])
        except Exception as error:
            written = error
        results.put(written)  # where the request's first finalizing function looks

    def _write(self, number: int, file: tuple) -> list:
        """Write one file; returns Megatron-Core's notes of what is where in it."""
        results, counts = queue.SimpleQueue(), queue.Queue()
        counts.put(number)
        FileSystemWriterAsync.write_preloaded_data(self._transforms, number, file, results, counts, use_fsync=True)
        _, found = results.get()
        if isinstance(found, Exception):
            raise found
        return found

    def finish(self) -> None:
        """Wait for it and write the metadata; all ranks must call it, on the training thread.

        Raises:
            CheckpointException: a rank couldn't write.
            OSError: this rank couldn't begin to.
        """
        self.join()
        if self._error is not None:
            raise self._error
        for function in self._request.finalize_fns:
            function()
