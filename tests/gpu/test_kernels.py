"""The project's own kernels give what the plain formulas give."""

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def plain(mixed: Tensor, angles: Tensor, queries: int) -> list[Tensor]:
    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        cos, sin = (f(angles)[:, None, None] for f in (torch.cos, torch.sin))
        return x * cos + torch.cat((-second, first), -1) * sin

    heads = mixed.unflatten(-1, (queries + 2, -1))
    query, key, value = heads.split((queries, 1, 1), 2)
    return [x.flatten(1, 2) for x in (turn(query), turn(key), value)]


@pytest.mark.parametrize("groups, queries, head", [(4, 5, 128), (2, 2, 32), (1, 1, 80), (3, 4, 24)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_split_and_rotary(groups, queries, head, dtype, tolerance):
    from nemo_bluelm.layers.rotary import split_rotary

    rows = 515
    make = torch.Generator("cuda").manual_seed(1)
    mixed = torch.randn(rows, groups, (queries + 2) * head, generator=make, device="cuda", dtype=dtype)
    half = (
        torch.rand(rows, head // 2, generator=make, device="cuda") * 32768
    )  # the angle of the last position, in radians
    angles = torch.cat((half, half), 1)
    exact = mixed.double().requires_grad_()
    mixed.requires_grad_()
    ours, reference = split_rotary(mixed, angles, queries), plain(exact, angles.double(), queries)
    grads = [torch.randn(x.shape, generator=make, device="cuda", dtype=dtype) for x in ours]
    for x, y in zip(ours, reference):
        assert x.is_contiguous() and x.dtype == dtype
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)
    torch.autograd.backward(ours, grads)
    torch.autograd.backward(reference, [grad.double() for grad in grads])
    torch.testing.assert_close(mixed.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_cross_entropy(dtype, tolerance):
    """Weights of one are left alone, others, and none, are not."""
    pytest.importorskip("transformer_engine")
    from nemo_bluelm.layers.cross_entropy import cross_entropy
    from nemo_bluelm.runtime.single import single_process_world

    rows, vocabulary = 130, 100_096
    make = torch.Generator("cuda").manual_seed(1)
    logits = (4 * torch.randn(rows, 1, vocabulary, generator=make, device="cuda")).to(dtype)
    labels = torch.randint(vocabulary, (1, rows), generator=make, device="cuda")
    weights = torch.tensor([1.0, 0.0, 0.5], device="cuda").repeat(rows)[:rows]
    exact = logits.double().requires_grad_()
    reference = torch.nn.functional.cross_entropy(exact[:, 0], labels[0], reduction="none")
    (reference * weights).sum().backward()
    logits.requires_grad_()
    with single_process_world():
        from megatron.core import parallel_state

        ours = cross_entropy(logits * 1, labels, parallel_state.get_tensor_model_parallel_group())
        assert ours.shape == (1, rows) and ours.dtype == torch.float32
        (ours[0] * weights).sum().backward()
    torch.testing.assert_close(ours[0].double(), reference, rtol=1e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-5)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=1e-7)
