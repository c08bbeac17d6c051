"""What a process must set before it imports Megatron-Core and NeMo. Call :func:`prepare` first."""

import logging
import os
import warnings


def prepare() -> None:
    """Pick the device layer and silence what users can't act on. Idempotent and cheap after the first call.

    A machine with a GPU is left as it is; without one, :mod:`nemo_bluelm.runtime.cpu` is activated.
    No telemetry leaves the machine: NeMo's OneLogger hooks, which also raise where they are not configured, are off.
    """
    warnings.filterwarnings("ignore")
    os.environ.setdefault("NEMO_LOG_TRAIN_LOSS", "0")  # our progress callback reports the loss, without a host sync
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")  # Megatron-Core compiles an allocator at import otherwise
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    for name in ("lightning", "megatron", "nv_one_logger", "torch.distributed", "transformers", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)

    import torch

    if not torch.cuda.is_available():
        from nemo_bluelm.runtime import cpu

        cpu.activate()

    from nemo.lightning.callback_group import CallbackGroup
    from nemo.utils import logging as nemo_logging

    CallbackGroup.get_instance()._callbacks.clear()
    nemo_logging.setLevel(logging.ERROR)
    for name in ("lightning.pytorch", "lightning.fabric"):  # Lightning sets their levels at import
        logging.getLogger(name).setLevel(logging.ERROR)
