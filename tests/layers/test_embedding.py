"""The embedding that adds its gradient to ``main_grad`` gives and learns what the usual one does."""

import pytest
import torch
from torch.nn import functional

from nemo_bluelm.layers.embedding import accumulating_embedding

VOCABULARY, HIDDEN = 11, 4


class Words:
    """What VocabParallelEmbedding is to the function, on one rank of ``ranks``."""

    def __init__(self, weight: torch.Tensor):
        self.weight, self.tp_group = torch.nn.Parameter(weight), self
        self.weight.main_grad = torch.ones_like(weight, dtype=torch.float32)

    def size(self) -> int:
        return 1


@pytest.mark.parametrize("shared", [True, False])
def test_output_and_gradient(shared):
    make = torch.Generator().manual_seed(1)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=make).bfloat16()
    tokens = torch.tensor([[3, 3, 0, 10, 3]])
    gradient = torch.randn(1, 5, HIDDEN, generator=make).bfloat16()
    exact = weight.double().requires_grad_()
    functional.embedding(tokens, exact).backward(gradient.double())

    words = Words(weight)
    rows = accumulating_embedding(words, tokens, shared)
    assert torch.equal(rows, weight[tokens])
    rows.backward(gradient)
    torch.testing.assert_close(words.weight.main_grad.double() - 1, exact.grad, rtol=0, atol=1e-6)
    assert words.weight.grad_added_to_main_grad
    assert (words.weight.grad is None) == shared
