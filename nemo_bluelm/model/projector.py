"""The adapter between ViT and language model: 2x2 token fold and a two-layer MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_bluelm.config.schema import Activation, ModelConfig, geometry_of, projector_width


def fold_tokens(features: Tensor, side: int, merge: int) -> Tensor:
    """Concatenate every ``merge x merge`` block of patches into one token; an odd grid gets a zero row and column.

    Args:
        features: [n, side * side, h], patches row by row.
        side: patches in a row.
        merge: patches folded in each direction.

    Returns:
        [n, ceil(side / merge)^2, merge * merge * h], tokens row by row, channels ordered (row, column, channel).
        It is VILA's ``DownSampleBlock`` (``flat_square``) with the token grid not transposed.
    """
    n, _, hidden = features.shape
    grid = features.view(n, side, side, hidden)
    pad = -side % merge
    if pad:
        grid = F.pad(grid, (0, 0, 0, pad, 0, pad))
    out = (side + pad) // merge
    grid = grid.view(n, out, merge, out, merge, hidden).permute(0, 1, 3, 2, 4, 5)
    return grid.reshape(n, out * out, merge * merge * hidden)


class Projector(torch.nn.Module):
    """Fold, LayerNorm, Linear, GELU, Linear (VILA's ``mlp_downsample``, as BlueLM-V-3B's parameter count shows).

    Args:
        model: gives the channel sizes before and after, the patch grid and the fold, and whether norm and activation
            are others than these.
    """

    def __init__(self, model: ModelConfig, dtype: torch.dtype, device=None):
        super().__init__()
        geometry, hidden = geometry_of(model), model.language.hidden_size
        self.side, self.merge = geometry.patches_per_side, geometry.merge
        self.gated = model.projector.activation is Activation.swiglu
        folded = model.vision.hidden_size * geometry.merge**2
        factory = dict(dtype=dtype, device=device)
        self.norm = torch.nn.LayerNorm(folded, **factory) if model.projector.layer_norm else torch.nn.Identity()
        self.linear_fc1 = torch.nn.Linear(folded, projector_width(model), **factory)
        self.linear_fc2 = torch.nn.Linear(hidden, hidden, **factory)

    def forward(self, features: Tensor) -> Tensor:
        """[n, side * side, vision_hidden] -> [n, tokens_per_tile, language_hidden]."""
        hidden = self.linear_fc1(self.norm(fold_tokens(features, self.side, self.merge)))
        if not self.gated:
            return self.linear_fc2(F.gelu(hidden))
        x, gate = hidden.chunk(2, -1)
        return self.linear_fc2(x * F.silu(gate))
