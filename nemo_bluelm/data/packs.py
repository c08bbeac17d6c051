"""Packs: documents laid end to end in one row of fixed length."""

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, zip_longest

import numpy as np
import torch

from nemo_bluelm.data.chat import Encoded

# Fields of a pack as they travel between ranks; token ids fit into 32 bits.
_WIRE = {
    "tokens": np.int32,
    "labels": np.int32,
    "loss_mask": np.uint8,
    "position_ids": np.int32,
    "cu_seqlens": np.int32,
    "cu_seqlens_padded": np.int32,
}
_ROWS = ("tokens", "labels", "loss_mask", "position_ids")
_OPTIONAL = ("sources", "teacher_ids", "teacher_scores")  # of rows, too, where they are not None
_FIELDS = {**_WIRE, "tokens": np.int64, "labels": np.int64, "loss_mask": np.float32, "position_ids": np.int64}


@dataclass(frozen=True)
class PackedBatch:
    """One row of S tokens holding n segments: the documents, then the unused tail as one more where it isn't empty.

    Each document takes its own length rounded up to a multiple of the alignment; the pad tokens that fill it up, and
    the whole tail, are masked. The two offset vectors are Transformer Engine's, for segment k:

    - ``cu_seqlens_padded[k] : cu_seqlens_padded[k + 1]`` is where it lies in the row; the last entry is S.
    - ``cu_seqlens[k + 1] - cu_seqlens[k]`` is how many of those tokens are real; 0 for the tail. These are not
      positions in the row unless nothing is padded.

    Attention that knows only one vector takes ``cu_seqlens_padded``: pads follow the real tokens of their segment, so
    a causal mask keeps them out.

    Attributes:
        tokens: int64 [1, S].
        labels: int64 [1, S]; ``labels[0, i]`` is the token after ``tokens[0, i]`` in its document, else pad.
        loss_mask: float32 [1, S]; 1 where ``labels`` is a target.
        position_ids: int64 [1, S]; from 0 in every segment.
        cu_seqlens: int32 [n + 1], cumulative real lengths.
        cu_seqlens_padded: int32 [n + 1], cumulative padded lengths.
        max_seqlen: longest padded segment, the tail included.
        tiles: uint8 [tiles, 3, T, T], in the order of their ``<image>`` tokens; may have 0 tiles.
        bounds: ``cu_seqlens_padded`` as integers of the host: reading a GPU's tensor would wait for the GPU.
        equal_segments: how many segments there are, if they have one padded length; else, or if unknown, 0.
        shares: by rank of the tensor and context group the places of the tiles that it holds, where each holds some of
            the row's tiles (see :mod:`nemo_bluelm.runtime.sharing`); None where ``tiles`` are all.
        sources: uint8 [1, S], the place of each token's source among the run's; None where nobody asks.
        teacher_ids, teacher_scores: int32 and float16 or float32 [1, S, k], a teacher's likeliest tokens after each and
            their log-probabilities; None in a run that learns from no stored logits.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    cu_seqlens_padded: torch.Tensor
    max_seqlen: int
    tiles: torch.Tensor
    bounds: tuple[int, ...] = ()
    equal_segments: int | None = None
    shares: tuple[tuple[int, ...], ...] | None = None
    sources: torch.Tensor | None = None
    teacher_ids: torch.Tensor | None = None
    teacher_scores: torch.Tensor | None = None

    def __post_init__(self):
        if not self.bounds:
            object.__setattr__(self, "bounds", tuple(self.cu_seqlens_padded.tolist()))
        if self.equal_segments is None:
            lengths = {end - start for start, end in pairwise(self.bounds)}
            object.__setattr__(self, "equal_segments", len(self.bounds) - 1 if len(lengths) == 1 else 0)

    @property
    def num_tokens(self) -> int:
        """Targets in the row."""
        return int(self.loss_mask.sum())

    def text_to_bytes(self) -> bytes:
        """All but the pixels, compressed: what a rank needs that decodes none."""
        whole = {name: getattr(self, name).numpy().astype(dtype) for name, dtype in _WIRE.items()}
        whole |= {name: getattr(self, name).numpy() for name in _OPTIONAL if getattr(self, name) is not None}
        file = io.BytesIO()
        np.savez_compressed(file, **whole, max_seqlen=self.max_seqlen, tiles=self.tiles.shape)
        return file.getvalue()

    @classmethod
    def text_from_bytes(cls, data: bytes) -> "PackedBatch":
        """The pack of :meth:`text_to_bytes`; its ``tiles`` have their shape, but lie on the "meta" device."""
        with np.load(io.BytesIO(data)) as whole:
            text = {name: torch.from_numpy(whole[name].astype(_FIELDS[name])) for name in _WIRE}
            text |= {name: torch.from_numpy(whole[name]) for name in _OPTIONAL if name in whole}
            tiles = torch.empty(*whole["tiles"].tolist(), dtype=torch.uint8, device="meta")
            return cls(**text, max_seqlen=int(whole["max_seqlen"]), tiles=tiles)

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same pack with every tensor on ``device``; a GPU fetches them without making the host wait."""
        moved = {k: to_device(v, device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return dataclasses.replace(self, **moved)

    def pinned(self) -> "PackedBatch":
        """The same pack, what lies on the host in memory that a GPU reads by itself."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor) and v.device.type == "cpu"}
        return dataclasses.replace(self, **{name: tensor.pin_memory() for name, tensor in tensors.items()})

    def of_one_document_each(self, packs: int) -> "PackedBatch":
        """The same ``packs`` packs, each of at most one document, with the tails as padding of the documents.

        Nothing that counts sees the tail, and segments of one length are a dense batch.

        Raises:
            ValueError: a pack has more documents.
        """
        length = self.tokens.size(1) // packs
        ends = [end for end in self.bounds if end % length == 0]
        real = self.cu_seqlens.diff().tolist()
        lengths = [max(real[first:last]) for first, last in pairwise(map(self.bounds.index, ends))]
        if len(ends) != packs + 1 or sum(lengths) != sum(real):
            raise ValueError(f"{len(self.bounds) - 1} segments are not {packs} packs of one document each")
        return dataclasses.replace(
            self,
            cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            cu_seqlens_padded=torch.tensor(ends, dtype=torch.int32),
            max_seqlen=length,
            bounds=(),
            equal_segments=packs,
        )

    def of_fixed_shape(self, documents: int) -> "PackedBatch":
        """The same pack with room for ``documents`` segments, the missing ones empty and at its end, and the whole row
        as ``max_seqlen``: numbers that don't change from pack to pack, as a CUDA graph needs.

        Raises:
            ValueError: it has more segments.
        """
        missing = documents + 1 - len(self.cu_seqlens)
        if missing < 0:
            raise ValueError(f"the pack has {len(self.cu_seqlens) - 1} segments, more than {documents}")
        padded, real = self.cu_seqlens_padded, self.cu_seqlens
        return dataclasses.replace(
            self,
            cu_seqlens=torch.cat([real, real[-1:].expand(missing)]),
            cu_seqlens_padded=torch.cat([padded, padded[-1:].expand(missing)]),
            max_seqlen=self.tokens.size(1),
            bounds=(),
            equal_segments=0,
        )


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """``tensor`` on ``device``. A plain copy from the host would wait until the GPU has done all that was queued."""
    device = torch.device(device)
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def join(packs: Sequence[PackedBatch]) -> PackedBatch:
    """Packs laid end to end in one row; segments stay apart, so each computes what it does alone.

    Args:
        packs: one or more, none of them shared out.
    """
    if len(packs) == 1:
        return packs[0]
    there = [*_ROWS, *(name for name in _OPTIONAL if getattr(packs[0], name) is not None)]
    rows = {name: torch.cat([getattr(pack, name) for pack in packs], dim=1) for name in there}
    return PackedBatch(
        **rows,
        cu_seqlens=_end_to_end([pack.cu_seqlens for pack in packs]),
        cu_seqlens_padded=_end_to_end([pack.cu_seqlens_padded for pack in packs]),
        max_seqlen=max(pack.max_seqlen for pack in packs),
        tiles=torch.cat([pack.tiles for pack in packs]),
    )


def _end_to_end(offsets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Offset vectors that each start at 0 as one."""
    lengths = torch.cat([offset.diff() for offset in offsets])
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)


def padded_length(length: int, alignment: int) -> int:
    """``length`` rounded up to a multiple of ``alignment``."""
    return -(-length // alignment) * alignment


def collate(
    documents: Sequence[Encoded],
    tiles: torch.Tensor,
    sequence_length: int,
    alignment: int,
    pad: int,
    sources: Sequence[int] | None = None,
) -> PackedBatch:
    """Lay ``documents`` end to end.

    Args:
        tiles: uint8 [tiles, 3, T, T] of all documents, in order.
        sequence_length: S, a multiple of ``alignment``.
        pad: id of the pad token.
        sources: the place of each document's source among the run's, below 256; None where nobody asks.

    Raises:
        ValueError: the documents don't fit, or S isn't a multiple of the alignment. The plan rules both out.
    """
    if sequence_length % alignment:
        raise ValueError(f"sequence_length {sequence_length} is not a multiple of the alignment {alignment}")
    tokens = torch.full((sequence_length,), pad, dtype=torch.int64)
    labels = torch.full((sequence_length,), pad, dtype=torch.int64)
    loss_mask = torch.zeros(sequence_length)
    position_ids = torch.zeros(sequence_length, dtype=torch.int64)
    source_of = torch.zeros(sequence_length, dtype=torch.uint8)
    real, padded = [0], [0]
    for document, source in zip_longest(documents, sources or (), fillvalue=0):
        start, length = padded[-1], len(document.tokens)
        end = start + padded_length(length, alignment)
        if end > sequence_length:
            raise ValueError(f"the documents need more than {sequence_length} tokens")
        ids = torch.tensor(document.tokens)
        tokens[start : start + length] = ids
        labels[start : start + length - 1] = ids[1:]
        loss_mask[start : start + length - 1] = torch.tensor(document.loss_mask[1:], dtype=torch.float32)
        position_ids[start:end] = torch.arange(end - start)
        source_of[start:end] = source
        real.append(real[-1] + length)
        padded.append(end)
    if padded[-1] < sequence_length:
        position_ids[padded[-1] :] = torch.arange(sequence_length - padded[-1])
        real.append(real[-1])
        padded.append(sequence_length)
    return PackedBatch(
        tokens=tokens[None],
        labels=labels[None],
        loss_mask=loss_mask[None],
        position_ids=position_ids[None],
        cu_seqlens=torch.tensor(real, dtype=torch.int32),
        cu_seqlens_padded=torch.tensor(padded, dtype=torch.int32),
        max_seqlen=max(end - start for start, end in zip(padded, padded[1:])),
        tiles=tiles,
        sources=None if sources is None else source_of[None],
    )
