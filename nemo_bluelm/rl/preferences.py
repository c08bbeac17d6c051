"""Pairs of answers of which one is preferred: their records, tokens and packs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_bluelm.config.schema import ControlToken
from nemo_bluelm.data.chat import Encoded, Message, encode_conversation
from nemo_bluelm.data.decode import load_tiles
from nemo_bluelm.data.packs import PackedBatch, collate
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry
from nemo_bluelm.rl.dataset import AllTaskDataset, Task

_ANSWERS = ("chosen", "rejected")


class PreferenceDataset(AllTaskDataset):
    """Records ``{"messages": [...], "chosen": text, "rejected": text}``, with ``images`` and sources as prompts have.

    ``messages`` end with the user's turn; ``prompt`` or ``problem`` may stand for them.

    Raises:
        UserError: as :class:`AllTaskDataset`; a record without two different answers.
    """

    def _messages(self, fields: dict[str, Any], where: str) -> tuple[list[Message], tuple[str, ...]]:
        for name in _ANSWERS:
            if not isinstance(fields.get(name), str) or not fields[name]:
                raise UserError(f"{where}: {name} is {fields.get(name)!r:.60}; it must be an answer in text")
        if fields["chosen"] == fields["rejected"]:
            raise UserError(f"{where}: chosen and rejected are both {fields['chosen']!r:.60}; remove it")
        messages = fields.get("messages")
        last = messages[-1] if isinstance(messages, list) and messages else None
        if isinstance(last, dict) and last.get("role") == "assistant":
            raise UserError(f"{where}: its messages end with an answer; leave it out, chosen and rejected are")
        return super()._messages(fields, where)


class Answered(NamedTuple):
    """A conversation with its last answer, to be scored; ``tiles`` uint8 [n, 3, T, T] are those of its images."""

    document: Encoded
    tiles: Tensor


class Pair(NamedTuple):
    """Two answers to one prompt."""

    chosen: Answered
    rejected: Answered

    @property
    def length(self) -> int:
        """Tokens of both."""
        return sum(len(answered.document.tokens) for answered in self)

    @property
    def tiles(self) -> int:
        """Of both; they have the same images."""
        return sum(len(answered.tiles) for answered in self)


@dataclass(frozen=True)
class ScoredBatch(PackedBatch):
    """A pack of answers whose scores are wanted; of pairs, the chosen one stands before the rejected one.

    Attributes:
        ends: int64 [n], the last real token of each document, which is its ``</s>``.
    """

    ends: Tensor | None = None


class Encoder:
    """Turns answers into documents, the same way for training and for scoring: no thought, no control token.

    Args:
        control_token: its place in the queries of earlier turns.
    """

    def __init__(self, tokenizer: Tokenizer, geometry: Geometry, control_token: ControlToken):
        self._tokenizer, self._geometry, self._control_token = tokenizer, geometry, control_token

    def answered(self, messages: Sequence[Message], images: Sequence[bytes], answers: Sequence[str]) -> list[Answered]:
        """Each of the answers to one prompt.

        Raises:
            UserError: messages and images that don't go together, or an image that can't be decoded.
        """
        side = self._geometry.tile
        each = [load_tiles(data, self._geometry, f"image {i + 1}", "torch") for i, data in enumerate(images)]
        counts = [len(image) * self._geometry.tokens_per_tile for image in each]
        tiles = torch.cat([torch.empty(0, 3, side, side, dtype=torch.uint8), *each])
        conversations = ([*messages, {"role": "assistant", "content": answer}] for answer in answers)
        return [
            Answered(encode_conversation(turns, self._tokenizer, counts, self._control_token), tiles)
            for turns in conversations
        ]

    def pair(self, task: Task) -> Pair:
        """A record's two answers.

        Raises:
            UserError: as :meth:`answered`.
        """
        return Pair(*self.answered(task.messages, task.images, [task.fields[name] for name in _ANSWERS]))


def lay(answers: Sequence[Answered], sequence_length: int, pad: int, tile: int) -> ScoredBatch:
    """Answers in one pack; of none, a pack that is all tail.

    Args:
        pad: id of the pad token.
        tile: pixels of a tile's side.
    """
    empty = torch.empty(0, 3, tile, tile, dtype=torch.uint8)
    tiles = torch.cat([empty, *(answered.tiles for answered in answers)])
    base = collate([answered.document for answered in answers], tiles, sequence_length, 1, pad)
    lengths = base.cu_seqlens.diff()[: len(answers)]
    ends = base.cu_seqlens_padded[: len(answers)] + lengths - 1
    return ScoredBatch(**vars(base), ends=ends.long())


def pack_pairs(
    pairs: Sequence[Pair], sequence_length: int, max_tiles: int, max_documents: int, pad: int, tile: int
) -> list[ScoredBatch]:
    """Pairs, none of them cut in two, in as few packs as first fit finds, the longest first; at least one pack.

    Args:
        sequence_length: tokens of a pack; every pair fits into one.
        max_tiles, max_documents: of a pack; a pair with more tiles gets a pack of its own.
    """
    packs: list[list[Pair]] = []
    rooms: list[list[int]] = []  # tokens, tiles and documents that still fit
    for pair in sorted(pairs, key=lambda pair: -pair.length):
        needs = [pair.length, pair.tiles, len(pair)]
        fits = (i for i, room in enumerate(rooms) if all(need <= left for need, left in zip(needs, room)))
        place = next(fits, None)
        if place is None:
            place = len(packs)
            packs.append([])
            rooms.append([sequence_length, max_tiles, max_documents])
        packs[place].append(pair)
        rooms[place] = [left - need for need, left in zip(needs, rooms[place])]
    answers = [[answered for pair in members for answered in pair] for members in packs]
    return [lay(members, sequence_length, pad, tile) for members in answers or [[]]]
