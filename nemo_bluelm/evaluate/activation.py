"""Does the control token switch thinking on whatever the instruction, and what are the answers worth?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_bluelm.data.chat import Encoded, encode_prompt
from nemo_bluelm.data.packs import collate
from nemo_bluelm.data.records import Record
from nemo_bluelm.generate.generator import Generator
from nemo_bluelm.generate.request import Prompt, Reply, Sampling

# 108 prompts of our own, 36 of each kind; tags are the kind and "exact" (half of them: one right answer) or "open".
PROMPTS = Path(__file__).with_name("prompts.jsonl")
EXACT = "exact"


@dataclass(frozen=True)
class Activation:
    """Replies to the prompts of one kind.

    Attributes:
        activated: share of the replies that begin with a thought when asked for one.
        unasked: share that begin with one when not.
        right: share of the exact prompts that are answered with the expected text when asked to think; None without
            exact prompts.
        likelihood: mean log-likelihood of the reference answers' tokens in nats, each after the model's own thought
            where it wrote one.
        count: prompts.
    """

    activated: float
    unasked: float
    right: float | None
    likelihood: float
    count: int


def activation(
    generator: Generator, prompts: Sequence[Record], max_new_tokens: int = 64, prompts_at_once: int = 128
) -> dict[str, Activation]:
    """Greedy replies to prompts of text, with the control token and without.

    Args:
        prompts: a question each and its reference answer; the first tag is the kind.
        max_new_tokens: of a reply, thought and answer together.

    Returns:
        By kind, in the order of their first prompts.

    Raises:
        UserError: messages that aren't a conversation.
    """
    unasked = [reply.thought is not None for reply in _replies(generator, prompts, False, 1, prompts_at_once)]
    replies = _replies(generator, prompts, True, max_new_tokens, prompts_at_once)
    likelihoods = list(_likelihoods(generator, prompts, replies, prompts_at_once))
    found = {}
    for kind in dict.fromkeys(prompt.tags[0] for prompt in prompts):
        rows = [row for row, prompt in enumerate(prompts) if prompt.tags[0] == kind]
        exact = [replies[row].answer.strip() == _reference(prompts[row]) for row in rows if EXACT in prompts[row].tags]
        sums, counts = zip(*(likelihoods[row] for row in rows))
        found[kind] = Activation(
            activated=sum(replies[row].thought is not None for row in rows) / len(rows),
            unasked=sum(unasked[row] for row in rows) / len(rows),
            right=sum(exact) / len(exact) if exact else None,
            likelihood=sum(sums) / sum(counts),
            count=len(rows),
        )
    return found


def _replies(generator: Generator, prompts: Sequence[Record], think: bool, new: int, at_once: int) -> list[Reply]:
    replies = []
    for at in range(0, len(prompts), at_once):
        some = [Prompt(prompt.messages[:-1], think=think) for prompt in prompts[at : at + at_once]]
        replies += generator.generate(some, Sampling(new, enforce=False))
    return replies


@torch.inference_mode()
def _likelihoods(
    generator: Generator, prompts: Sequence[Record], replies: Sequence[Reply], at_once: int
) -> Iterator[tuple[float, int]]:
    """Of each reference answer, its end included: the sum over its tokens, and their number."""
    tokenizer, device = generator.tokenizer, next(generator.model.parameters()).device
    tiles = torch.empty(0, 3, generator.geometry.tile, generator.geometry.tile, dtype=torch.uint8)
    documents, lengths = [], []
    for prompt, reply in zip(prompts, replies):
        tokens = encode_prompt(prompt.messages[:-1], tokenizer, (), True, generator.control_token)
        if reply.thought is not None:
            tokens = [*tokens, tokenizer.think, *tokenizer.encode(reply.thought), tokenizer.think_end]
        answer = [*tokenizer.encode(_reference(prompt)), tokenizer.eos]
        documents.append(Encoded([*tokens, *answer], [False] * len(tokens) + [True] * len(answer)))
        lengths.append(len(answer))
    for at in range(0, len(documents), at_once):
        some = documents[at : at + at_once]
        length = sum(len(document.tokens) for document in some)
        pack = collate(some, tiles, length, alignment=1, pad=tokenizer.pad).to(device)
        losses = generator.model(pack, labels=pack.labels)[0].double().cpu()
        # The loss at a position is that of the token after it; a document's last position has none.
        for end, count in zip(pack.cu_seqlens[1:].tolist(), lengths[at : at + at_once]):
            yield -float(losses[end - 1 - count : end - 1].sum()), count


def _reference(prompt: Record) -> str:
    return prompt.messages[-1]["content"]
