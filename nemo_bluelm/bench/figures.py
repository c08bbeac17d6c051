"""What is made of the times of steps, and what memory they took."""

from statistics import median

import torch

GIB = 2**30


def spread(values: list[float], digits: int = 5) -> dict[str, float]:
    """Median, least and largest."""
    return {name: round(of(values), digits) for name, of in (("median", median), ("min", min), ("max", max))}


def rates(
    seconds: list[float], tokens: list[float], flops: list[float], gpus: int, peak: float | None
) -> dict[str, object]:
    """What a reader compares, from the steps that count.

    Args:
        seconds: of each step.
        tokens: real tokens of each step, over all GPUs.
        flops: model FLOPs of each step, over all GPUs.
        peak: FLOP/s of one GPU in BF16; None where it is not known.

    Returns:
        ``step_seconds`` {median, min, max}; medians over the steps of ``tokens_per_second`` (all GPUs), ``tflops``
        (each GPU) and ``mfu`` (of the BF16 peak; None without a peak).
    """
    rate = median(count / second for count, second in zip(tokens, seconds))
    of_each = median(work / second / gpus for work, second in zip(flops, seconds))
    return {
        "step_seconds": spread(seconds),
        "tokens_per_second": round(rate, 1),
        "tflops": float(f"{of_each / 1e12:.4g}"),
        "mfu": None if peak is None else round(of_each / peak, 4),
    }


def stalls(seconds: list[float], before: int, save_every: int) -> dict[str, object]:
    """How long checkpoints held training up.

    Args:
        seconds: of each step that counts.
        before: steps before them.
        save_every: steps from one checkpoint to the next, counted from the run's start.

    Returns:
        ``stalls``, one for each checkpoint that is followed by ``save_every`` steps: seconds by which these took
        longer than as many median steps; ``longest``, by which the longest of them did; ``of_a_step``, the mean of
        ``stalls`` over the median step (None without one).
    """
    step = median(seconds)
    after = [saved - before for saved in range(save_every, before + len(seconds), save_every)]
    whole = [start for start in after if 0 <= start <= len(seconds) - save_every]
    followed = [[second - step for second in seconds[start : start + save_every]] for start in whole]
    found = [round(sum(more), 5) for more in followed]
    return {
        "stalls": found,
        "longest": [round(max(more), 5) for more in followed],
        "of_a_step": round(sum(found) / len(found) / step, 4) if found else None,
    }


def peak_memory() -> dict[str, float] | None:
    """GiB that PyTorch's allocator gave out and held at most since the last reset; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"allocated_gib": round(allocated / GIB, 2), "reserved_gib": round(reserved / GIB, 2)}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory did not suffice, in PyTorch's or a library's words."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ("out of memory", "ALLOC_FAILED"))
