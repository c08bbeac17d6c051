"""What a measurement was made on: device and versions."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

TRAINING = (
    *("torch", "transformer-engine", "transformer-engine-torch", "megatron-core", "nemo-toolkit", "transformers"),
    *("lightning", "apex", "numpy"),
)


def machine(device: str) -> dict:
    """The CPU and, where ``device`` isn't ``cpu``, the current GPU."""
    try:
        with open("/proc/cpuinfo") as lines:
            model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.machine()
    gpu = {"gpu": torch.cuda.get_device_name()} if device != "cpu" else {}
    return {"cpu": model, "cores": os.cpu_count(), "simd": torch.backends.cpu.get_cpu_capability(), **gpu}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def training_environment() -> dict:
    """``machine`` and ``versions`` of a training measurement, CUDA and cuDNN included where there is a GPU."""
    on_gpu = torch.cuda.is_available()
    found = versions(TRAINING)
    if on_gpu:
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {"machine": machine("cuda" if on_gpu else "cpu"), "versions": found}


def device_name() -> str:
    """The current GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
