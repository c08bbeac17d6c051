"""Answers that are places in an image: boxes, and points in boxes."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.scorers.base import Score, Scorer

_NUMBER = r"[-+]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400}|nan|inf(?:inity)?)(?:e[-+]?\d{1,9})?"
_GAP = r"\s{0,8}[,;\s]\s{0,8}"
_CLOSE_OPEN = r"\s{0,8}[)\]]?\s{0,8}[,;]?\s{0,8}[(\[]?\s{0,8}"  # between the corners: "(1, 2), (3, 4)"
_BOX = re.compile(
    rf"[(\[]\s{{0,8}}({_NUMBER}){_GAP}({_NUMBER})(?:{_GAP}|{_CLOSE_OPEN})({_NUMBER}){_GAP}({_NUMBER})\s{{0,8}}[)\]]",
    re.IGNORECASE,
)
_POINT = re.compile(rf"[(\[]\s{{0,8}}({_NUMBER}){_GAP}({_NUMBER})\s{{0,8}}[)\]]", re.IGNORECASE)
_LARGEST = 1e6  # of coordinates in pixels; no image has as many

Numbers = tuple[float, ...]


@dataclass
class Place(Scorer):
    """What boxes and points share.

    Attributes:
        reference: field with the box, [x1, y1, x2, y2] with x1 < x2 and y1 < y2.
        scale: coordinates are from 0 to it, in answers and references alike; None: pixels.
    """

    reference: str = "box"
    scale: Optional[float] = None

    def check(self) -> None:
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise UserError(f"scale is {self.scale}; it must be greater than 0")

    def _reference(self, fields: Mapping[str, Any]) -> Optional[Numbers]:
        value = fields[self.reference]
        if isinstance(value, str):
            found = _numbers(_BOX, value)
            value = found[0] if len(found) == 1 else None
        if not isinstance(value, Sequence) or len(value) != 4:
            return None
        try:
            box = tuple(float(number) for number in value)
        except (TypeError, ValueError):
            return None
        return None if self._wrong(box) else box

    def _wrong(self, numbers: Numbers) -> str:
        """Why it can't be a box or a point, if it can't."""
        largest = _LARGEST if self.scale is None else self.scale
        if not all(math.isfinite(number) for number in numbers):
            return "a coordinate isn't finite"
        if not all(0 <= number <= largest for number in numbers):
            return f"a coordinate isn't between 0 and {largest:g}"
        if len(numbers) == 4 and (numbers[0] >= numbers[2] or numbers[1] >= numbers[3]):
            return "the box has its corners the wrong way round"
        return ""

    def _one(self, answer: str, kinds: Sequence[re.Pattern]) -> Union[Numbers, Score]:
        """The only box or point in an answer; the first kind that there is any of."""
        found = next((numbers for kind in kinds if (numbers := _numbers(kind, answer))), [])
        distinct = list(dict.fromkeys(map(str, found)))
        if len(distinct) != 1:
            return Score(0.0, f"{len(distinct)} boxes or points where there must be one" if found else "no box")
        wrong = self._wrong(found[0])
        return Score(0.0, wrong) if wrong else found[0]


@dataclass
class Iou(Place):
    """Intersection over union of the answer's box and the reference's.

    Attributes:
        threshold: the score is 1 from this overlap on and else 0; None: the overlap itself.
    """

    name = "iou"
    threshold: Optional[float] = None

    def check(self) -> None:
        super().check()
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise UserError(f"threshold is {self.threshold}; it must be greater than 0 and at most 1")

    def score(self, answer: str, fields: Mapping[str, Any]) -> Score:
        right = self._reference(fields)
        if right is None:
            return self.no_reference(fields, "a box [x1, y1, x2, y2]")
        box = self._one(answer, [_BOX])
        if isinstance(box, Score):
            return box
        overlap = iou(box, right)
        return Score(overlap if self.threshold is None else float(overlap >= self.threshold))


@dataclass
class Point(Place):
    """1 if the point that the answer names, or the middle of its box, lies in the reference's box."""

    name = "point"

    def score(self, answer: str, fields: Mapping[str, Any]) -> Score:
        right = self._reference(fields)
        if right is None:
            return self.no_reference(fields, "a box [x1, y1, x2, y2]")
        found = self._one(answer, [_BOX, _POINT])
        if isinstance(found, Score):
            return found
        x, y = found if len(found) == 2 else ((found[0] + found[2]) / 2, (found[1] + found[3]) / 2)
        return Score(float(right[0] <= x <= right[2] and right[1] <= y <= right[3]))


def iou(one: Numbers, other: Numbers) -> float:
    """Of two boxes x1, y1, x2, y2 with x1 < x2 and y1 < y2."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return both / (areas - both)


def _numbers(kind: re.Pattern, text: str) -> list[Numbers]:
    return [tuple(float(number) for number in match.groups()) for match in kind.finditer(text)]
