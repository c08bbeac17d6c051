"""Needle in a haystack: does the model find a number that a long document tells, by length and depth of its place?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from nemo_bluelm.data.needle import Haystack
from nemo_bluelm.generate.generator import Generator
from nemo_bluelm.generate.request import Prompt, Sampling

MAX_NEW_TOKENS = 12  # the longest number takes fewer


@dataclass(frozen=True)
class Cell:
    """Documents of one length with the needle at one depth.

    Attributes:
        length: tokens of a document with its question, at most.
        depth: place of the needle, 0 at the start of the document, 1 right before the question.
        found: share of the answers that are the number, from 0 to 1.
        count: documents.
    """

    length: int
    depth: float
    found: float
    count: int


def needle_retrieval(
    generator: Generator,
    texts: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    count: int = 8,
    seed: int = 0,
    tokens_at_once: int = 16384,
) -> list[Cell]:
    """Retrieval by length and depth, greedy and without thinking.

    Args:
        texts: where the sentences around the needle come from; held-out ones.
        lengths: tokens; a length may be longer than what the model was trained for.
        count: documents of each length and depth.
        seed: of documents, names and numbers.
        tokens_at_once: tokens of the documents that are answered together.

    Raises:
        ValueError: the texts hold no usable sentence.
    """
    haystack = Haystack(texts, lambda text: len(generator.tokenizer.encode(text)))
    cells = []
    for length in lengths:
        for depth in depths:
            rng = Random(f"{seed}/{length}/{depth}")
            documents = [haystack.hide(rng, length, depth) for _ in range(count)]
            right = 0
            for some in _batches(documents, max(1, tokens_at_once // length)):
                prompts = [Prompt(messages[:-1]) for messages, _ in some]
                replies = generator.generate(prompts, Sampling(MAX_NEW_TOKENS, enforce=False))
                right += sum(reply.answer == number for reply, (_, number) in zip(replies, some))
            cells.append(Cell(length, depth, right / count, count))
    return cells


def found_by_length(cells: Sequence[Cell]) -> dict[int, float]:
    """Mean over the depths, by length."""
    lengths = sorted({cell.length for cell in cells})
    found = {length: [cell.found for cell in cells if cell.length == length] for length in lengths}
    return {length: sum(shares) / len(shares) for length, shares in found.items()}


def _batches(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[at : at + size] for at in range(0, len(items), size))
