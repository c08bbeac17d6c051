"""The divergence on pieces of the vocabulary is the dense one, forward and backward."""

from pathlib import Path

import pytest
import torch

from tests.layers.divergence_worker import compute
from tests.runtime.processes import torchrun

WORKER = Path(__file__).with_name("divergence_worker.py")
VOCABULARY = 48


def cases():
    generator = torch.Generator().manual_seed(0)
    result = []
    for temperature, k, scale in (
        *((1.0, None, 3), (2.5, None, 3), (1.0, None, 60)),  # 60: most probabilities vanish in fp32
        *((1.0, 5, 3), (0.7, 5, 3), (1.0, VOCABULARY, 3), (1.0, 30, 3), (1.0, 5, 30)),
    ):
        student, teacher = torch.randn(2, 11, VOCABULARY, dtype=torch.float64, generator=generator) * scale
        weights = torch.rand(11, dtype=torch.float64, generator=generator)
        # What fp32 ranks get is exactly what the reference gets.
        result.append((student.float().double(), teacher.float().double(), weights.float().double(), temperature, k))
    equal = result[0][0]
    return [*result, (equal, equal, result[0][2], 1.0, None), (equal, equal, result[0][2], 1.0, 4)]


def dense(student, teacher, weights, temperature, k):
    """The definition, in fp64 on whole rows; of k tokens, the others are one more outcome."""
    student = student.clone().requires_grad_()
    q, p = (torch.softmax(logits / temperature, 1) for logits in (student, teacher))
    if k is not None and k < VOCABULARY:
        ids = teacher.topk(k, 1).indices
        others = torch.ones_like(p).scatter(1, ids, 0)
        p, q = (torch.cat((x.gather(1, ids), (x * others).sum(1, keepdim=True)), 1) for x in (p, q))
    rows = torch.special.xlogy(p, p).sum(1) - torch.special.xlogy(p, q).sum(1)
    (rows * weights).sum().backward()
    return rows.detach(), student.grad


@pytest.mark.usefixtures("world")
def test_whole_rows_as_the_dense_divergence():
    check([compute(cases(), torch.distributed.group.WORLD)])


def test_pieces_on_two_ranks_as_the_dense_divergence(tmp_path):
    torch.save(cases(), tmp_path / "cases.pt")
    torchrun(2, WORKER, tmp_path / "cases.pt", tmp_path, "tensor")
    check([torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)])


@pytest.mark.slow
def test_rows_on_two_ranks_as_the_dense_divergence(tmp_path):
    """Context parallelism: each rank has some rows of a document, and the whole vocabulary."""
    from nemo_bluelm.layers.context import context_indices

    of_eight_rows = [(*(x[:8] for x in case[:3]), *case[3:]) for case in cases()]
    torch.save(of_eight_rows, tmp_path / "cases.pt")
    torchrun(2, WORKER, tmp_path / "cases.pt", tmp_path, "context")
    for rank in range(2):
        mine = context_indices((0, 8), 2, rank)
        for found, case in zip(torch.load(tmp_path / f"rank{rank}.pt"), of_eight_rows):
            rows, grad = dense(*case)
            assert_close(found[0], rows[mine], case)
            assert_close(found[1], grad[mine], case)


def check(ranks):
    for number, case in enumerate(cases()):
        rows, grad = dense(*case)
        for rank in ranks:
            assert_close(rank[number][0], rows, case)
        assert_close(torch.cat([rank[number][1] for rank in ranks], 1), grad, case)


def assert_close(found, expected, case):
    error = (found.double() - expected).abs().max().item()
    assert error <= 1e-6 * max(1.0, expected.abs().max().item()), (error, case[3:])


def test_the_reference_tells_differences():
    """A reference that were always near zero would compare nothing."""
    rows = [dense(*case)[0] for case in cases()]
    assert all(row.min() > 1e-3 for row in rows[:8])
    assert all(row.abs().max() < 1e-12 for row in rows[8:])


def test_fewer_tokens_never_tell_more():
    student, teacher, weights, temperature, _ = cases()[0]
    whole, _ = dense(student, teacher, weights, temperature, None)
    rows = [dense(student, teacher, weights, temperature, k)[0] for k in (2, 10, 40)]
    assert (rows[0] <= rows[1]).all() and (rows[1] <= rows[2]).all() and (rows[2] <= whole + 1e-12).all()
