"""Divergences under torchrun, each rank with its piece of the vocabulary.

torchrun --nproc-per-node=N divergence_worker.py CASES OUT
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


def main(cases: str, out: str) -> None:
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    torch.save(compute(torch.load(cases), group), f"{out}/rank{group.rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
