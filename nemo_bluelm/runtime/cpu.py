"""Run NeMo and Megatron-Core on a machine with no GPU: CUDA calls go to the CPU, nothing else changes.

Megatron-Core and NeMo call ``torch.cuda`` by name in hundreds of places. On a machine without a GPU this module gives
those names a CPU meaning, once per process, so that the code that trains on a cluster is the code that runs here. The
rewriting of device arguments holds for the thread that activated it, the one that trains.
"""

import contextlib
from typing import Optional

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_FACTORY_NAMES = (
    "tensor as_tensor asarray scalar_tensor arange linspace empty full ones zeros eye rand randn randint randperm "
    "normal empty_like full_like ones_like zeros_like rand_like randn_like"
)
_METHOD_NAMES = "new_empty new_full new_ones new_zeros new_tensor"
FACTORIES = frozenset(
    [getattr(torch, name) for name in _FACTORY_NAMES.split()]
    + [getattr(torch.Tensor, name) for name in _METHOD_NAMES.split()]
)
_mode: Optional["CudaToCpu"] = None


def _means_cuda(device) -> bool:
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


class CudaToCpu(TorchFunctionMode):
    """Rewrites the CUDA arguments of tensor factories and moves; leaves every other function alone."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers sort parameters by these names and know the CUDA ones only.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to:
            args = tuple(CPU if _means_cuda(arg) else arg for arg in args)
        if func in FACTORIES or func is torch.Tensor.to:
            kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
            if _means_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
        return func(*args, **kwargs)


class _Stream:
    """An inert stand-in for a CUDA stream or event: on a CPU everything is already ordered."""

    device = CPU

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False

    def nothing(self, *args, **kwargs):
        return None

    wait_stream = wait_event = wait = synchronize = record = record_stream = nothing

    def record_event(self, *args):
        return self

    def query(self) -> bool:
        return True

    def elapsed_time(self, other) -> float:
        return 0.0


class _DeviceProperties:
    major, minor, name, total_memory, multi_processor_count = 0, 0, "cpu", 0, 1


def activate() -> None:
    """Send CUDA to the CPU for the rest of the process; call before Megatron-Core is imported. Idempotent.

    Raises:
        RuntimeError: a GPU is present, where redirecting would silently train on the CPU.
    """
    global _mode
    if _mode is not None:
        return
    if torch.cuda.is_available():
        raise RuntimeError("the CPU adapter must not be activated where a GPU is present")

    cuda = torch.cuda
    cuda.Stream = cuda.Event = _Stream
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    cuda.current_stream = cuda.default_stream = lambda *args: _Stream()
    cuda.current_device = lambda: CPU
    cuda.device_count = lambda: 1  # NeMo seeds Megatron's RNG tracker only where there is a device
    cuda.get_device_properties = lambda *args: _DeviceProperties()
    cuda.get_device_capability = lambda *args: (0, 0)
    for name in ("set_device", "synchronize", "empty_cache", "set_stream", "reset_peak_memory_stats", "ipc_collect"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("max_memory_allocated", "memory_allocated", "max_memory_reserved", "memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed) and None
    for dtype in ("Float", "Double", "Half", "BFloat16", "Int", "Long", "Byte"):
        setattr(cuda, f"{dtype}Tensor", getattr(torch, f"{dtype}Tensor"))
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None

    _mode = CudaToCpu()
    _mode.__enter__()
    _patch_megatron()


def _patch_megatron() -> None:
    """The places that reach CUDA below ``torch.cuda``'s public names."""
    import logging

    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # Forking the RNG tracker always moves "the CPU state" here, because it is the only one.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)

    import nemo.lightning.io.pl as nemo_io

    nemo_io._fix_tensors_device = lambda checkpoint: checkpoint
