"""Our packs in the forms that a transformers model can take."""

from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from nemo_bluelm.data.packs import PackedBatch

NO_TARGET = -100


class HFBatch(NamedTuple):
    """One forward pass of the peer.

    Attributes:
        tokens: int64 [b, s].
        labels: int64 [b, s]; ``labels[i]`` is the token after ``tokens[i]``, -100 is no target.
        tiles: uint8 [n, 3, T, T].
        positions: int64 [1, s].
        documents: int64 [s] that tells the documents of a packed row apart; None where a row is one document.
    """

    tokens: Tensor
    labels: Tensor
    tiles: Tensor
    positions: Tensor
    documents: Optional[Tensor]

    def to(self, device: str) -> "HFBatch":
        """The same on ``device``, copied while the host goes on."""
        return HFBatch(*(part if part is None else part.to(device, non_blocking=True) for part in self))

    def pinned(self) -> "HFBatch":
        """The same in memory that a GPU copies from without waiting."""
        return HFBatch(*(part if part is None else part.pin_memory() for part in self))

    def mask(self) -> Optional[Tensor]:
        """bool [1, 1, s, s], causal inside each document; None where plain causal attention says the same."""
        if self.documents is None:
            return None
        same = self.documents[:, None] == self.documents[None, :]
        return same.tril()[None, None]


def is_single(pack: PackedBatch) -> bool:
    """Whether a pack is one document without padding."""
    return int(pack.cu_seqlens[1]) == pack.tokens.size(1)


def rows(packs: Sequence[PackedBatch]) -> HFBatch:
    """Packs of one document each as the rows of a batch."""
    tokens = torch.cat([pack.tokens for pack in packs])
    labels = torch.cat([_labels(pack) for pack in packs])
    return HFBatch(tokens, labels, _tiles(packs), torch.arange(tokens.size(1))[None], None)


def padded(packs: Sequence[PackedBatch]) -> HFBatch:
    """The documents of the packs as rows, filled up on the right to the longest; causal attention never sees pads."""
    tokens, labels = [], []
    for pack in packs:
        marked = _labels(pack)
        for start, length in zip(pack.cu_seqlens_padded.tolist(), pack.cu_seqlens.diff().tolist()):
            if length:
                tokens.append(pack.tokens[0, start : start + length])
                labels.append(marked[0, start : start + length])
    pad = torch.nn.utils.rnn.pad_sequence
    whole = pad(tokens, batch_first=True)
    filled = pad(labels, batch_first=True, padding_value=NO_TARGET)
    return HFBatch(whole, filled, _tiles(packs), torch.arange(whole.size(1))[None], None)


def packed(packs: Sequence[PackedBatch]) -> HFBatch:
    """The packs end to end in one row, whose documents are told apart by a mask."""
    documents, found = [], 0
    for pack in packs:
        lengths = pack.cu_seqlens_padded.diff()
        documents.append(found + torch.repeat_interleave(torch.arange(len(lengths)), lengths))
        found += len(lengths)
    tokens, labels = torch.cat([pack.tokens for pack in packs], 1), torch.cat([_labels(pack) for pack in packs], 1)
    positions = torch.cat([pack.position_ids for pack in packs], 1)
    return HFBatch(tokens, labels, _tiles(packs), positions, torch.cat(documents))


FORMS = {"rows": rows, "padded": padded, "packed": packed}


def _labels(pack: PackedBatch) -> Tensor:
    return pack.labels.masked_fill(pack.loss_mask == 0, NO_TARGET)


def _tiles(packs: Sequence[PackedBatch]) -> Tensor:
    return torch.cat([pack.tiles for pack in packs])
