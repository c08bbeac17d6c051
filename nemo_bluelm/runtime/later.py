"""What the host wants to know of a step without stalling the GPU: numbers read later, and times on the GPU's clock."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[float], device: torch.device) -> Tensor:
    """A float64 tensor [len(values)] on ``device``; the host doesn't wait for the copy, as ``torch.tensor`` would."""
    on_gpu = device.type == "cuda"
    return torch.tensor(values, dtype=torch.float64, pin_memory=on_gpu).to(device, non_blocking=True)


class Later:
    """The values of a tensor, on their way to the host since this was made.

    Asking for them as soon as the work that gives them is queued would leave the GPU without work until the host has
    queued more; asked for a step later, they are there.

    Args:
        values: 1-D; must not be written to any more.
    """

    def __init__(self, values: Tensor):
        self._event = None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = values

    def get(self) -> list:
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


class Stamp:
    """A point in time: on a GPU, when it has done all that was queued before."""

    def __init__(self, device: torch.device):
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._seconds = time.perf_counter()

    def seconds_until(self, later: "Stamp") -> float:
        """Waits until both points are reached."""
        if self._event is None:
            return later._seconds - self._seconds
        later._event.synchronize()
        return self._event.elapsed_time(later._event) / 1000  # milliseconds
