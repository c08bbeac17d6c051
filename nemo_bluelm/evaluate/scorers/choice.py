"""Which of several choices an answer states: a letter, or one of a few words such as yes and no."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.scorers.base import Score, Scorer, last_boxed

_MANY = 26
# Marks around a letter, at most a few: "**(B)**", "\text{B}", "[B]".
_OPEN = r"[\s:：=\"'“‘*_`$(\[{（]{0,8}(?:\\(?:text|textbf|mathrm|mathbf|rm)\{[\s(]{0,4})?"
_LETTER = r"(?P<letter>[A-Z])(?![A-Za-z0-9'’])"
_IS = r"(?:\s{1,4}(?:is|are|was|would\s{1,4}be|must\s{1,4}be|should\s{1,4}be))?"
_DECLARED = re.compile(
    rf"(?:(?<!not )\b(?i:(?:answer|(?:correct|right|best)\s{{1,4}}(?:option|choice|one)){_IS}"
    rf"|choose|choosing|select|pick|it(?:\s{{1,4}}is|['’]s))(?:\s{{1,4}}(?i:option|choice))?|答案(?:是|为|選|选)?|[选選]项?)"
    rf"{_OPEN}{_LETTER}|(?:^|[\s(*]){_LETTER.replace('letter', 'before')}[)*.]{{0,3}}\s{{1,4}}"
    rf"is\s{{1,4}}(?:the\s{{1,4}})?(?:correct|right|best)\b"
)
_ALONE = re.compile(rf"^\W{{0,8}}(?i:option |choice )?{_LETTER}\W{{0,8}}$", re.MULTILINE)
_FIRST = re.compile(rf"\A\W{{0,8}}{_LETTER}[)\]*]{{0,4}}\s{{0,2}}(?:[.):：,;\n-]|\Z)")
_BRACKETED = re.compile(r"[(\[（](?P<letter>[A-Z])[)\]）]")
_STANDING = re.compile(rf"(?<![A-Za-z0-9'’\\]){_LETTER}")
_ARTICLE = re.compile(r"\s{1,4}(?!(?:because|since|as|is|and|but|so|for|which|due|or)\b)[a-z]")  # "A cat"
_SECOND_THOUGHTS = re.compile(r"\b(?:wait|actually|rather|instead|correction|sorry|but|no)\b", re.IGNORECASE)


@dataclass
class Letter(Scorer):
    """Multiple choice: 1 if the last choice that the answer states is the right one.

    It may be stated as a letter (boxed, "Answer: B", "(B)", a line of its own) or as an option's text.

    Attributes:
        reference: field with the letter, the option's text or its number from 0.
        options: field with the list of options; without it the letters are A to Z.
    """

    name = "mcq"
    options: str = "options"

    def applies(self, fields: Mapping[str, Any]) -> bool:
        options, reference = fields.get(self.options), fields.get(self.reference)
        if options is None:
            return isinstance(reference, str) and re.fullmatch(r"[A-Z]", reference.strip()) is not None
        return isinstance(options, list) and len(options) > 0

    def score(self, answer: str, fields: Mapping[str, Any]) -> Score:
        options = [str(option) for option in fields.get(self.options) or ()]
        right = _right_letter(fields.get(self.reference), options)
        if right is None:
            return self.no_reference(fields, "one of its options")
        stated = stated_letter(answer, options)
        return Score(float(stated == right), "" if stated else "no choice is stated")


@dataclass
class Word(Scorer):
    """1 if the word that the answer settles on is the right one: "Yes, but no." is a no, "Yes, no doubt" a yes.

    Attributes:
        words: those that an answer may be.
    """

    name = "word"
    words: list[str] = field(default_factory=lambda: ["yes", "no"])

    def check(self) -> None:
        if len({word.casefold() for word in self.words}) < 2 or not all(word.strip() for word in self.words):
            raise UserError(f"words is {self.words}; it must be two words or more")

    def score(self, answer: str, fields: Mapping[str, Any]) -> Score:
        right = str(fields[self.reference]).strip().casefold()
        if right not in {word.casefold() for word in self.words}:
            return self.no_reference(fields, f"one of {', '.join(self.words)}")
        stated = stated_word(answer, self.words)
        return Score(float(stated == right), "" if stated else "no choice is stated")


def stated_letter(answer: str, options: Sequence[str] = ()) -> Optional[str]:
    """The letter of the choice that an answer states last, or None.

    What is declared counts more than what stands first, that more than a letter in brackets, and a letter anywhere
    least; an option's text counts where there is no letter.

    Args:
        options: texts of A, B, ...; without them any capital may be a choice.
    """
    letters = [chr(ord("A") + number) for number in range(min(len(options), _MANY) or _MANY)]
    boxed = last_boxed(answer)
    if boxed is not None:
        inside = _ALONE.search(boxed.replace("\\text{", "").replace("\\mathrm{", "").replace("}", ""))
        found = inside["letter"] if inside else _option_in(boxed, options)
        if found in letters:
            return found
    if re.fullmatch(r"\W{0,4}[a-z]\W{0,4}", answer):  # nothing but a small letter
        answer = answer.upper()
    declared = [_found(match) for match in _DECLARED.finditer(answer) if not _article(match, answer)]
    alone = [(match.start(), match["letter"]) for match in _ALONE.finditer(answer)]
    if stated := _last(sorted([*declared, *alone]), letters):
        return stated
    first = _FIRST.match(answer)
    if first and first["letter"] in letters and not _SECOND_THOUGHTS.search(answer, first.end()):
        return first["letter"]
    bracketed = [(match.start(), match["letter"]) for match in _BRACKETED.finditer(answer)]
    if stated := _last(bracketed, letters):
        return stated
    # "I" is a choice only where nothing else can be meant.
    standing = [
        (match.start(), match["letter"])
        for match in _STANDING.finditer(answer)
        if not _article(match, answer) and match["letter"] != "I"
    ]
    return _last(standing, letters) or _option_in(answer, options)


def stated_word(answer: str, words: Sequence[str]) -> Optional[str]:
    """The word, in lower case, that an answer settles on, or None.

    A word counts where a clause ends with it; in an answer without such a place the first one does.
    """
    either = "|".join(re.escape(word) for word in words)
    text = last_boxed(answer) or answer
    found = list(re.finditer(rf"\b({either})\b(?=\W{{0,4}}(?:[.,;:!?)*\n]|\Z))", text, re.IGNORECASE))
    if found:
        return found[-1][1].casefold()
    first = re.search(rf"\b({either})\b", text, re.IGNORECASE)
    return first[1].casefold() if first else None


def _right_letter(reference: Any, options: Sequence[str]) -> Optional[str]:
    if isinstance(reference, bool) or reference is None:
        return None
    if isinstance(reference, int):
        return chr(ord("A") + reference) if 0 <= reference < min(len(options), _MANY) else None
    text = str(reference).strip()
    letter = re.fullmatch(r"\(?([A-Z])[).]?", text)
    if letter and (not options or ord(letter[1]) - ord("A") < len(options)):
        return letter[1]
    folded = [_folded(option) for option in options]
    return chr(ord("A") + folded.index(_folded(text))) if _folded(text) in folded else None


def _option_in(answer: str, options: Sequence[str]) -> Optional[str]:
    """The option whose text the answer has last; of two that end at one place the longer one."""
    text, best = _folded(answer), None
    for number, option in enumerate(options[:_MANY]):
        if not (wanted := _folded(option)):
            continue
        ends = [match.end() for match in re.finditer(rf"(?<!\w){re.escape(wanted)}(?!\w)", text)]
        if ends and (best is None or (ends[-1], len(wanted)) > best[:2]):
            best = ends[-1], len(wanted), chr(ord("A") + number)
    return best and best[2]


def _found(match: re.Match) -> tuple[int, str]:
    return match.start(), match["letter"] or match["before"]


def _article(match: re.Match, answer: str) -> bool:
    """Whether the letter is the word "a" at the start of something."""
    return match["letter"] == "A" and _ARTICLE.match(answer, match.end("letter")) is not None


def _last(found: Sequence[tuple[int, str]], letters: Sequence[str]) -> Optional[str]:
    return next((letter for _, letter in reversed(found) if letter in letters), None)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .")
