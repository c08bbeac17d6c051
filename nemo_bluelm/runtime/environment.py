"""What a process must set before it imports Megatron-Core and NeMo. Imports nothing heavy itself."""

import logging
import os
import warnings
from dataclasses import dataclass

from nemo_bluelm.errors import UserError


@dataclass(frozen=True)
class Launch:
    """This process's place in the job that a launcher (torchrun, our ``--nproc``) described in the environment."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def local_rank(self) -> int:
        """Place among the ranks of this machine, which is the number of this rank's GPU."""
        return self.rank % self.local_world_size

    @classmethod
    def from_environment(cls) -> "Launch":
        """One process of its own where RANK is not set.

        Raises:
            UserError: a variable is missing or no number.
        """
        if "RANK" not in os.environ:
            return cls()
        values = {}
        for name, default in (("RANK", ""), ("WORLD_SIZE", ""), ("LOCAL_WORLD_SIZE", "1"), ("MASTER_PORT", "0")):
            value = os.environ.get(name, default)
            if not value.isdecimal():
                raise UserError(
                    f"the environment has RANK, but {name} is {value!r}, no number; start ranks with torchrun or "
                    "--nproc, or unset RANK"
                )
            values[name] = int(value)
        return cls(values["RANK"], values["WORLD_SIZE"], values["LOCAL_WORLD_SIZE"])


def quiet() -> None:
    """Silence what users can't act on: deprecations and missing optional packages of the libraries below us."""
    warnings.filterwarnings("ignore")
    for name in ("lightning", "megatron", "nv_one_logger", "torch.distributed", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)


def prepare() -> None:
    """Pick the device layer. Call it before anything imports Megatron-Core; idempotent and cheap after the first call.

    A machine with a GPU is left as it is; without one, :mod:`nemo_bluelm.runtime.cpu` is activated.
    No telemetry leaves the machine: NeMo's OneLogger hooks, which also raise where they are not configured, are off.
    """
    quiet()
    os.environ.setdefault("NEMO_LOG_TRAIN_LOSS", "0")  # our metrics callback reports it
    # Without a list, Megatron-Core's import fails on a machine that has nvcc and no GPU.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    # Transformer Engine's own norm kernels are tuned for few sizes; at 2560 and 1152 channels cuDNN's are 2.5 times as
    # fast (H200).
    for direction in ("FWD", "BWD"):
        os.environ.setdefault(f"NVTE_NORM_{direction}_USE_CUDNN", "1")

    import torch

    if not torch.cuda.is_available():
        from nemo_bluelm.runtime import cpu

        cpu.activate()

    from nemo.lightning.callback_group import CallbackGroup
    from nemo.utils import logging as nemo_logging

    CallbackGroup.get_instance()._callbacks.clear()
    nemo_logging.setLevel(logging.ERROR)
    # Lightning sets these levels at import, under both of its package names.
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
