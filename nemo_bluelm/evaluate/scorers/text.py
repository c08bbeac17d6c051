"""Answers that are texts: the same, or nearly the same, as a reference."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.scorers.base import Score, Scorer, need

MATCHES = ("whole", "contains")


@dataclass
class Exact(Scorer):
    """1 if the answer is one of the references; spaces, and a full stop at the end, don't count.

    Attributes:
        match: ``whole``, or ``contains`` where the reference may stand anywhere in the answer (OCRBench).
        case: whether upper and lower case differ.
        votes: references that must agree with the answer for a whole point; fewer give their share (VQA accuracy: 3).
        tolerance: of numbers, relative to the reference (ChartQA's relaxed accuracy has 0.05); None: none.
    """

    name = "exact"
    match: str = "whole"
    case: bool = False
    votes: int = 1
    tolerance: Optional[float] = None

    def check(self) -> None:
        if self.match not in MATCHES:
            raise UserError(f"match is {self.match!r}; it must be one of {', '.join(MATCHES)}")
        if self.votes < 1:
            raise UserError(f"votes is {self.votes}; it must be 1 or more")
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise UserError(f"tolerance is {self.tolerance}; it must be from 0 to 1")

    def score(self, answer: str, fields: Mapping[str, Any]) -> Score:
        references = [self._plain(reference) for reference in self.references(fields)]
        references = [reference for reference in references if reference]
        if not references:
            return self.no_reference(fields, "a text")
        said = self._plain(answer)
        agree = sum(self._same(said, reference) for reference in references)
        return Score(min(1.0, agree / self.votes))

    def _plain(self, text: str) -> str:
        text = " ".join(text.split()).removesuffix(".")
        return text if self.case else text.casefold()

    def _same(self, said: str, reference: str) -> bool:
        if self.match == "contains":
            return reference in said
        if said == reference or self.tolerance is None:
            return said == reference
        number, wanted = _number(said), _number(reference)
        if number is None or wanted is None:
            return False
        return abs(number - wanted) <= self.tolerance * abs(wanted)


@dataclass
class Anls(Scorer):
    """Average normalised Levenshtein similarity (arXiv 1907.00490), the best of the references.

    Attributes:
        threshold: a distance, relative to the longer text, from which on the score is 0.
        case: whether upper and lower case differ.
    """

    name = "anls"
    threshold: float = 0.5
    case: bool = False

    def check(self) -> None:
        need("rapidfuzz", "the scorer anls")
        if not 0 < self.threshold <= 1:
            raise UserError(f"threshold is {self.threshold}; it must be greater than 0 and at most 1")

    def score(self, answer: str, fields: Mapping[str, Any]) -> Score:
        from rapidfuzz.distance import Levenshtein

        references = [self._plain(reference) for reference in self.references(fields)]
        if not references:
            return self.no_reference(fields, "a text")
        said = self._plain(answer)
        # With the cut-off a text that is far too long costs nothing; what is beyond it comes back as 1.
        cutoff = self.threshold
        distance = min(Levenshtein.normalized_distance(said, text, score_cutoff=cutoff) for text in references)
        return Score(1 - distance if distance < self.threshold else 0.0)

    def _plain(self, text: str) -> str:
        text = " ".join(text.split())
        return text if self.case else text.casefold()


def _number(text: str) -> Optional[float]:
    """A number as charts have it, with thousands' commas, a dollar or a percent sign."""
    try:
        value = float(text.strip("$ ").replace(",", "").removesuffix("%"))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
