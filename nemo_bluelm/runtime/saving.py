"""A rank's part of a checkpoint on its way to the disk, while training goes on."""

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, Optional

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch import Tensor

from nemo_bluelm.runtime.checksums import Checksum, checksums

_ALIGNMENT = 256  # bytes, of a copied tensor
_TOUCHED_BY_A_THREAD = 2**28  # bytes at a time
_TOUCHING_THREADS = 8


class HostCopy:
    """The state of this rank in host memory, which every checkpoint uses again.

    On a GPU the memory is page-locked and copied to beside the kernels of the next step: forward and backward passes
    only read weights and optimizer state, and :meth:`wait` holds the next update back until the copy is made.
    """

    def __init__(self):
        self._memory: Optional[Tensor] = None  # bytes
        self._stream: Optional[torch.cuda.Stream] = None
        self._copied: Optional[torch.cuda.Event] = None

    def reserve(self, size: int, on_gpu: bool) -> None:
        """Have memory for ``size`` bytes; locking the pages of 40 GB takes seconds, so do it before the training."""
        if self._memory is not None and self._memory.numel() >= size:
            return
        self._release()
        self._memory = torch.empty(size, dtype=torch.uint8)
        if on_gpu:
            # Not by PyTorch's allocator of pinned memory, which rounds every tensor up to a power of two.
            parts = self._memory.split(_TOUCHED_BY_A_THREAD)
            with ThreadPoolExecutor(_TOUCHING_THREADS) as threads:
                list(threads.map(Tensor.zero_, parts))  # the kernel maps pages one by one as they are touched
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0))
            self._stream = torch.cuda.Stream()

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Begin to copy; the copies are there after :meth:`synchronize`."""
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        starts = [0, *accumulate(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors)]
        self.reserve(starts[-1], on_gpu)
        copies = [
            self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(starts, tensors)
        ]
        if not on_gpu:
            for copy, tensor in zip(copies, tensors):
                copy.copy_(tensor)
            return copies
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for copy, tensor in zip(copies, tensors):
                copy.copy_(tensor, non_blocking=True)
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)  # some are made for the checkpoint alone
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copies

    def wait(self) -> None:
        """Let what is queued on the GPU from now on begin after the copy; the host doesn't wait."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def synchronize(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def _release(self) -> None:
        if self._stream is not None:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
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
        self._copy.synchronize()
        results: dict[int, Any] | Exception
        try:
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
