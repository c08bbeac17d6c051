"""Keys and values of the tokens that generation has seen: filled from packs, then one token a sequence at a time."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Place:
    """Which cells of the caches the rows of a forward pass belong to; one for all layers.

    Attributes:
        sequences, positions: int64 [t], the cell of each row.
        mask: bool [sequences, 1, 1, width], what each sequence's token sees; None for packs, where the attention on
            packs itself knows.
    """

    sequences: Tensor
    positions: Tensor
    mask: Tensor | None = None


class KVCache:
    """One layer's keys and values, after RoPE.

    Args:
        shape: sequences, groups, tokens of a sequence at most, channels of a head.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.key, self.value = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    def store(self, key: Tensor, value: Tensor, place: Place) -> None:
        """Keys and values [t, groups, d] into their cells."""
        self.key[place.sequences, :, place.positions] = key
        self.value[place.sequences, :, place.positions] = value

    def attend(self, query: Tensor, place: Place, scale: float | None) -> Tensor:
        """Queries [sequences, heads, d], one a sequence, to all that each has seen -> [sequences, heads, d]."""
        width = place.mask.size(-1)
        # The queries of a group see the same keys, so they are laid out as if they followed one another.
        grouped = query.unflatten(1, (self.key.size(1), -1))
        out = F.scaled_dot_product_attention(
            grouped, self.key[:, :, :width], self.value[:, :, :width], attn_mask=place.mask, scale=scale
        )
        return out.flatten(1, 2)

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences, in this order; one may come several times. int64 [n]."""
        self.key, self.value = self.key[sequences], self.value[sequences]


class CachedAttention:
    """Mixin of a ``core_attention`` that also works from a cache, while it has a place for what comes.

    Attributes:
        cache: of this layer, filled by passes over packs and read by passes over single tokens.
        place: of the next pass; None outside of generation.
    """

    cache: KVCache | None = None
    place: Place | None = None

    def cached(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """Keep keys and values; where each row is the next token of a sequence, attend to what it has seen.

        Args:
            query: [t, heads, d] or [t, 1, heads, d]; key, value: the same with ``groups`` heads.

        Returns:
            [t, heads * d] or [t, 1, heads * d]; None if the pass is not from the cache.
        """
        if self.place is None:
            return None
        self.cache.store(key.flatten(0, -3), value.flatten(0, -3), self.place)
        if self.place.mask is None:
            return None
        out = self.cache.attend(query.flatten(0, -3), self.place, self.config.softmax_scale)
        return out.reshape(*query.shape[:-2], -1)
