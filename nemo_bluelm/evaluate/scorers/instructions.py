"""Instructions that can be verified: whether an answer follows those that its record lists."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.scorers.base import Score, Scorer
from nemo_bluelm.evaluate.scorers.instruction_checks import BadInstruction, follows

COUNTS = ("all", "share")


@dataclass
class Instructions(Scorer):
    """Instructions by id, as IFEval's records have them; English and Chinese.

    Attributes:
        reference: field with the list of ids.
        kwargs: field with a mapping for each of them, or a text of JSON; what is None there does not count.
        count: ``all``: 1 if every one is followed (prompt level); ``share``: of them (instruction level).
        loose: whether an answer may also follow one without its first or last line, or without asterisks.
    """

    name = "instructions"
    reference: str = "instruction_id_list"
    kwargs: str = "kwargs"
    count: str = "all"
    loose: bool = False

    def check(self) -> None:
        if self.count not in COUNTS:
            raise UserError(f"count is {self.count!r}; it must be one of {', '.join(COUNTS)}")

    def score(self, answer: str, fields: Mapping[str, Any]) -> Score:
        listed = fields.get(self.reference)
        if not isinstance(listed, list) or not listed:
            return self.no_reference(fields, "a list of instructions")
        try:
            given = _kwargs(fields.get(self.kwargs), len(listed))
            texts = _readings(answer) if self.loose else [answer]
            broken = [
                name for name, kwargs in zip(listed, given) if not any(follows(text, name, kwargs) for text in texts)
            ]
        except BadInstruction as error:
            return Score(None, str(error))
        value = 1 - len(broken) / len(listed) if self.count == "share" else float(not broken)
        return Score(value, f"not followed: {', '.join(broken)}" if broken else "")


def _kwargs(given: Any, count: int) -> list[Mapping[str, Any]]:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise BadInstruction(f"the record's kwargs are no JSON: {error}") from error
    given = [{}] * count if given is None else given
    given = [given] if isinstance(given, dict) and count == 1 else given
    fits = isinstance(given, list) and len(given) == count
    if not fits or not all(isinstance(kwargs, (dict, type(None))) for kwargs in given):
        raise BadInstruction(f"the record's kwargs are no list of {count} mappings, one for each instruction")
    return [kwargs or {} for kwargs in given]


def _readings(answer: str) -> list[str]:
    """An answer, and without its first line, its last or both; each with and without asterisks."""
    lines = answer.split("\n")
    texts = ["\n".join(lines[first : len(lines) - last]).strip() for first in (0, 1) for last in (0, 1)]
    texts[0] = answer
    return [*texts, *(text.replace("*", "") for text in texts)]
