"""What a scorer is: an answer and the fields of its record in, a score from 0 to 1 out."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar, Optional

from nemo_bluelm.errors import UserError

_BRACES = re.compile(r"\\boxed\{|[{}]")


@dataclass(frozen=True)
class Score:
    """What an answer is worth.

    Attributes:
        value: from 0 to 1, or None where nobody can tell.
        reason: why it is None, or 0 where that isn't plain.
        passing: another try may tell.
        timed_out: a time limit was reached.
    """

    value: Optional[float]
    reason: str = ""
    passing: bool = False
    timed_out: bool = False


@dataclass
class Scorer:
    """The fields of a subclass are its options. Scoring may go on in several threads.

    Attributes:
        reference: field of the record that has the right answer, or a list of answers that are all right.
    """

    name: ClassVar[str]
    reference: str = "answer"

    def check(self) -> None:
        """Look for mistakes before anything is generated.

        Raises:
            UserError: options that can't be, a package that isn't installed.
        """

    def open(self) -> None:
        """Start what it needs, so that no answer waits for it; scoring does so too if nobody did."""

    def longest(self) -> float:
        """Seconds that its own limits allow an answer; 0: it has none."""
        return 0.0

    def applies(self, fields: Mapping[str, Any]) -> bool:
        """Whether it can score such a record; a task may have several scorers."""
        return self.reference in fields

    def score(self, answer: str, fields: Mapping[str, Any]) -> Score:
        """Score one answer, whatever it is; a reference that makes no sense leaves it unscored."""
        raise NotImplementedError

    def close(self) -> None:
        """End what it started."""

    def references(self, fields: Mapping[str, Any]) -> list[str]:
        """The right answers as texts."""
        value = fields[self.reference]
        values = value if isinstance(value, (list, tuple)) else [value]
        return [item if isinstance(item, str) else str(item) for item in values if item is not None]

    def no_reference(self, fields: Mapping[str, Any], wanted: str) -> Score:
        """For a record whose reference isn't one."""
        return Score(None, f"the record's {self.reference} is {fields.get(self.reference)!r:.60}, not {wanted}")


def last_boxed(text: str) -> Optional[str]:
    r"""What the last ``\boxed{...}`` holds, its braces balanced; None without one that is closed."""
    opened: list[tuple[int, bool]] = []  # braces: where what they hold begins, and whether they are a box's
    last: Optional[tuple[int, int]] = None
    for mark in _BRACES.finditer(text):
        if mark[0] != "}":
            opened.append((mark.end(), mark[0] != "{"))
        elif opened:
            begin, boxed = opened.pop()
            if boxed and (last is None or begin > last[0]):
                last = begin, mark.start()
    return last and text[slice(*last)]


def need(module: str, what_for: str) -> ModuleType:
    """Import a module of the extra ``eval``.

    Raises:
        UserError: it can't be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"{what_for} needs {module} ({error}); pip install 'nemo-bluelm[eval]'") from error
