"""The second linear layer of the local (no Transformer Engine) layer spec's MLP."""

from megatron.core.tensor_parallel.layers import RowParallelLinear
from torch import Tensor


class BiasedRowParallelLinear(RowParallelLinear):
    """Megatron-Core's layer, with its bias added.

    Megatron-Core hands the bias on to be added with the residual. When the MLP is recomputed, autograd then takes the
    bias for a result of the recomputation, and going backward never ends.
    """

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        out, bias = super().forward(input_)
        return (out if bias is None else out + bias), None
