"""The kernels of one training step, by PyTorch's profiler."""

import time
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_ROWS = 40
_COLUMN = 100  # characters of a kernel's name


class Profile:
    """Call ``start`` before the step and ``finish`` after it.

    Args:
        path: gets a head line (wall time, sum of kernel times, launches) and the table of the longest kernels; on a
            CPU, of the longest operators.
    """

    def __init__(self, path: Path):
        self._path, self._on_gpu = Path(path), torch.cuda.is_available()

    def start(self) -> None:
        self._synchronize()
        # Kernels alone: recording every operator on the host would slow a step that the host holds up.
        activity = ProfilerActivity.CUDA if self._on_gpu else ProfilerActivity.CPU
        self._profile = profile(activities=[activity])
        self._profile.start()
        self._started = time.perf_counter()

    def finish(self, write: bool = True) -> None:
        """
        Args:
            write: whether this rank writes the file.
        """
        self._synchronize()
        wall = time.perf_counter() - self._started
        self._profile.stop()
        if not write:
            return
        averages = self._profile.key_averages()
        head = f"wall {1000 * wall:.1f} ms"
        if self._on_gpu:
            kernels = [event for event in self._profile.events() if event.device_type == DeviceType.CUDA]
            total = sum(event.device_time_total for event in kernels)
            head += f", kernels {total / 1000:.1f} ms in {len(kernels):,} launches"
        by = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"
        table = averages.table(sort_by=by, row_limit=_ROWS, max_name_column_width=_COLUMN)
        self._path.write_text(f"{head}\n{table}\n")

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
