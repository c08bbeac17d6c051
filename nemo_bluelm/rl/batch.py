"""Replies as the training graph takes them: packs with what policy optimisation knows of every token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_bluelm.data.chat import Encoded
from nemo_bluelm.data.packs import PackedBatch, collate, padded_length
from nemo_bluelm.generate.request import Reply, TokenPrompt
from nemo_bluelm.rl.segments import Segments


@dataclass(frozen=True)
class Sample:
    """A reply to a prompt.

    Attributes:
        kept: whether its tokens push the policy; a reply cut at its length may not.
    """

    prompt: TokenPrompt
    reply: Reply
    kept: bool = True

    @property
    def length(self) -> int:
        return len(self.prompt.tokens) + len(self.reply.tokens)


@dataclass(frozen=True)
class RolloutBatch(PackedBatch):
    """A pack of replies. Vectors are fp32 [1, S]; at a place is what belongs to the token after it, as in ``labels``.

    ``loss_mask`` is 1 where that token was sampled, and not put in by force.

    Attributes:
        advantages: of the token's reply; None until they are known.
        rollout_logp: log-probabilities by what sampled the tokens.
        old_logp: by the training graph before the step's first update; None where the first update is the only one.
        ref_logp: by the reference; None without a penalty.
    """

    advantages: Tensor | None = None
    rollout_logp: Tensor | None = None
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None

    def segments(self) -> Segments:
        """Its replies, and the tail as one more."""
        lengths = [end - start for start, end in zip(self.bounds, self.bounds[1:])]
        return Segments.of_lengths(lengths, self.tokens.device)

    def with_advantages(self, advantages: Sequence[float]) -> "RolloutBatch":
        """The same with the advantages of its replies, in their order."""
        of_segments = torch.tensor([*advantages, 0.0])  # the tail's
        return replace(self, advantages=self.segments().spread(of_segments)[None])


def arrange(
    samples: Sequence[Sample], sequence_length: int, max_tiles: int, max_documents: int, alignment: int
) -> list[list[int]]:
    """The places of the replies that each pack has: as few packs as first fit finds, the longest reply first.

    Args:
        sequence_length: tokens of a pack; every sample fits into one.
        max_tiles, max_documents: of a pack; a sample with more tiles gets a pack of its own.
        alignment: each sample's length is rounded up to a multiple of it.
    """
    packs: list[list[int]] = []
    rooms: list[list[int]] = []  # tokens, tiles and documents that still fit
    for index, sample in sorted(enumerate(samples), key=lambda pair: -pair[1].length):
        needs = [padded_length(sample.length, alignment), len(sample.prompt.tiles), 1]
        fits = (i for i, room in enumerate(rooms) if all(need <= left for need, left in zip(needs, room)))
        place = next(fits, None)
        if place is None:
            place = len(packs)
            packs.append([])
            rooms.append([sequence_length, max_tiles, max_documents])
        packs[place].append(index)
        rooms[place] = [left - need for need, left in zip(needs, rooms[place])]
    return packs


def lay(samples: Sequence[Sample], sequence_length: int, alignment: int, pad: int) -> RolloutBatch:
    """One pack of the samples, in their order."""
    documents, logprobs = [], torch.zeros(1, sequence_length)
    start = 0
    for sample in samples:
        prompt, reply = sample.prompt.tokens, sample.reply
        sampled = [sample.kept and not injected for injected in reply.injected]
        documents.append(Encoded([*prompt, *reply.tokens], [*[False] * len(prompt), *sampled]))
        first = start + len(prompt) - 1
        logprobs[0, first : first + len(reply.tokens)] = torch.tensor(reply.logprobs)
        start += padded_length(sample.length, alignment)
    tiles = torch.cat([sample.prompt.tiles for sample in samples])
    base = collate(documents, tiles, sequence_length, alignment, pad)
    return RolloutBatch(**vars(base), rollout_logp=logprobs)
