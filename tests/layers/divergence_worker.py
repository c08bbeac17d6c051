"""Divergences under torchrun, each rank with its piece of the vocabulary, or with its rows of a pack.

torchrun --nproc-per-node=N divergence_worker.py CASES OUT tensor|context
"""

import sys

import torch

from nemo_bluelm.layers.divergence import divergence, likeliest, top_k_divergence


def compute(cases: list, group: torch.distributed.ProcessGroup) -> list:
    """(divergence of every row, gradient of this rank's piece) of each case."""
    found = []
    for student, teacher, weights, temperature, k in cases:
        student, teacher = (x.float().chunk(group.size(), 1)[group.rank()].clone() for x in (student, teacher))
        student.requires_grad_()
        if k is None:
            rows = divergence(student, teacher, temperature, group)
        else:
            rows = top_k_divergence(student, *likeliest(teacher, k, temperature, group), temperature, group)
        (rows * weights.float()).sum().backward()
        found.append((rows.detach(), student.grad))
    return found


def of_context_rank(cases: list) -> list:
    """The cases with the rows that this context-parallel rank has of one document of them all."""
    from nemo_bluelm.layers.context import context_rows

    found = []
    for student, teacher, weights, temperature, k in cases:
        rows = [context_rows(rows[None], (0, len(rows)))[0] for rows in (student, teacher, weights)]
        found.append((*rows, temperature, k))
    return found


def main(cases: str, out: str, split: str) -> None:
    cases = torch.load(cases)
    if split == "tensor":
        torch.distributed.init_process_group("gloo")
        group = torch.distributed.group.WORLD
    else:
        from nemo_bluelm.runtime.environment import prepare

        prepare()
        from megatron.core import parallel_state

        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel(context_parallel_size=torch.distributed.get_world_size())
        cases, group = of_context_rank(cases), parallel_state.get_tensor_model_parallel_group()
    torch.save(compute(cases, group), f"{out}/rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
