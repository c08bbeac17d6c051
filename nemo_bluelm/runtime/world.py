"""A distributed world of one process, for work that needs Megatron modules but no job."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_process_world() -> Iterator[None]:
    """Megatron's process groups with one rank; no network, no environment variables. Call ``prepare`` before."""
    from megatron.core import parallel_state

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
