"""Long documents with a needle: a fact far before the question that asks for it.

The needle is a number in words, so that no other word of the document is like it and a tiny model can learn the task;
the task is passkey retrieval (arXiv 2305.16300).
"""

import re
from collections.abc import Callable, Sequence
from random import Random

from nemo_bluelm.data.writer import RawSample

TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
UNITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMES = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "ivory", "jade", "koala", "lotus")
_SPECIAL_TOKENS = 16  # room for the chat's own, the line break and what joining texts may add
_SENTENCE = range(20, 120)  # characters


class Haystack:
    """Sentences without numbers, to hide needles among.

    Args:
        texts: where the sentences come from.
        measure: length of a text, in whatever unit ``length`` of :meth:`hide` has; a tokenizer's number of tokens, say.

    Raises:
        ValueError: the texts hold no usable sentence.
    """

    def __init__(self, texts: Sequence[str], measure: Callable[[str], int]):
        numbers = re.compile(r"\d|\b(" + "|".join(TENS + UNITS) + r")\b", re.IGNORECASE)
        whole = (" ".join(part.split()) + "." for text in texts for part in re.split(r"[.!?]", text))
        sentences = sorted({s for s in whole if len(s) in _SENTENCE and not numbers.search(s)})
        if not sentences:
            raise ValueError("the texts hold no sentence without a number")
        self._sentences = [(sentence, measure(" " + sentence)) for sentence in sentences]
        self._measure = measure

    def hide(self, rng: Random, length: int, depth: float | None = None) -> tuple[list[dict], str]:
        """A conversation of at most ``length``, and close to it: a document with a needle, and the question for it.

        Args:
            depth: where the needle stands, from 0 (start of the document) to 1 (its end); None draws it.

        Returns:
            Messages as a record has them, the answer included, and the answer.
        """
        name, number = rng.choice(NAMES), f"{rng.choice(TENS)} {rng.choice(UNITS)}"
        fact, question = f"The secret number of {name} is {number}.", f"What is the secret number of {name}?"
        room = length - _SPECIAL_TOKENS - sum(map(self._measure, (" " + fact, " " + question, number)))
        hay: list[str] = []
        while room >= 0:
            sentence, size = rng.choice(self._sentences)
            hay.append(sentence)
            room -= size
        if hay:
            hay.pop()  # the one that was too much
        place = rng.randint(0, len(hay)) if depth is None else round(depth * len(hay))
        document = " ".join([*hay[:place], fact, *hay[place:], question])
        return [{"role": "user", "content": document}, {"role": "assistant", "content": number}], number


def needle_samples(
    haystack: Haystack, lengths: Sequence[int], seed: str, tags: Sequence[str], turns: int = 1
) -> list[RawSample]:
    """A sample of each length, needles at any depth; ``seed`` also begins the keys, which must not hold a dot.

    Args:
        lengths: of the first turn.
        turns: how often the question comes in a sample: the more often, the more of its tokens are targets.
    """
    rng, samples = Random(seed), []
    for number, length in enumerate(lengths):
        messages, answer = haystack.hide(rng, length)
        question = re.split(r"(?<=\.) ", messages[0]["content"])[-1]
        for _ in range(turns - 1):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        samples.append(RawSample(f"{seed}-{number:05d}", {"messages": messages, "tags": [*tags]}))
    return samples


def sample_texts() -> list[str]:
    """Every word of the needles in its place, to train a tokenizer on."""
    numbers = [f"{tens} {units}" for tens in TENS for units in UNITS]
    return [
        text
        for name in NAMES
        for number in numbers
        for text in (f"The secret number of {name} is {number}.", f"What is the secret number of {name}?", number)
    ]
