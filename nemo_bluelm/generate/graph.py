"""A step of generation as a CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor


class StepGraph:
    """The kernels of a step, recorded once and launched together.

    Args:
        step: of tokens int64 [sequences], their positions int64 [sequences] and a width; it neither waits for the
            device nor allocates what outlives it, and its kernels have run before.
        sequences, width: of every step.

    Attributes:
        width: as given.
    """

    def __init__(self, step: Callable[[Tensor, Tensor, int], Tensor], sequences: int, width: int, device: torch.device):
        self.width = width
        self._inputs = torch.zeros(2, sequences, dtype=torch.int64, device=device)
        self._graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would collect garbage and empty the allocator's cache, which takes longer than the recording.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._graph.capture_begin()
            self._logits = step(*self._inputs, width)
            self._graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits of the step; the next call overwrites them."""
        torch.stack((tokens, positions), out=self._inputs)
        self._graph.replay()
        return self._logits
