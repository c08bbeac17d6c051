"""Which of several choices an answer states: a letter, or one of a few words such as yes and no."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.scorers.base import Score, Scorer, last_boxed
from nemo_bluelm.evaluate.scorers.claims import Mention, changes_its_mind, settled, stated

_MANY = 26
# Marks around a letter, at most a few: "**(B)**", "\text{B}", "[B]".
_OPEN = r"[\s:：=\"'“‘*_`$(\[{（]{0,8}(?:\\(?:text|textbf|mathrm|mathbf|rm)\{[\s(]{0,4})?"
_LETTER = r"(?P<letter>[A-Z])(?![A-Za-z0-9'’])"
_IS = r"(?:\s{1,4}(?:is|are|was|would\s{1,4}be|must\s{1,4}be|should\s{1,4}be))?"
_DECLARED = re.compile(
    rf"(?:(?<!not )\b(?i:(?:answer|(?:correct|right|best)\s{{1,4}}(?:option|choice|one)){_IS}"
    rf"|choose|choosing|select|pick|it(?:\s{{1,4}}is|['’]s))(?:\s{{1,4}}(?i:option|choice))?|答案(?:是|为|選|选)?|[选選]项?)"
    rf"{_OPEN}{_LETTER}|(?:^|[\s(*]){_LETTER.replace('letter', 'before')}[)*.]{{0,3}}(?:\s…{{1,400}})?\s{{1,4}}"
    rf"is\s{{1,4}}(?:the\s{{1,4}})?(?:correct|right|best)\b"
)
_ALONE = re.compile(rf"^\W{{0,8}}(?i:option |choice )?{_LETTER}\W{{0,8}}$", re.MULTILINE)
_FIRST = re.compile(rf"\A\W{{0,8}}{_LETTER}[)\]*]{{0,4}}\s{{0,2}}(?:[.):：,;\n—–-]|\Z)")
_BRACKETED = re.compile(r"[(\[（](?P<letter>[A-Z])[)\]）]")
_STANDING = re.compile(rf"(?<![A-Za-z0-9'’\\]){_LETTER}")
_ARTICLE = re.compile(r"\s{1,4}(?!(?:because|since|as|is|and|but|so|for|which|due|or)\b)[a-z]")  # "A cat"
_CONCLUDED = re.compile(rf"(?:\b(?i:so|thus|hence|therefore)\b|所以|因此)[,，]?{_OPEN}{_LETTER}\W{{0,8}}\Z")
# In front of an option's text that is declared to be the answer.
_DECLARES = re.compile(
    r"(?:\banswer(?:\s{1,4}is)?|\bit(?:\s{1,4}is|['’]s)|\b(?:so|thus|hence|therefore|choose|select|pick)\b"
    r"|答案(?:是|为)?|所以|因此|选)[\s:：,\"'“‘*_`$(\[{（]{0,8}(?:the\s{1,4})?\Z"
)
# Around a letter that stands for itself beside another one, as B does in "A, maybe B", but not in "A, as B is red".
_STANDS_TOO = re.compile(
    r"(?:^|[.,;:!?(（]|\b(?:or|and|maybe|perhaps|possibly|probably|also|option|choice)\b)[\s*(\[\"'“]{0,4}\Z",
    re.IGNORECASE | re.MULTILINE,
)
_IS_SUBJECT = re.compile(
    r"[\"'”’)\]}*]{0,4}(?:[\s(:]{0,3}…{1,400}\)?)?\s{1,4}(?:is|are|was|has|shows|looks|does|would|can)\b"
)


@dataclass
class Letter(Scorer):
    """Multiple choice: 1 if the last choice that the answer states is the right one.

    It may be stated as a letter (boxed, "Answer: B", "(B)", a line of its own) or as an option's text. What is ruled
    out ("not B") isn't stated, and several choices without a word on which it is ("A or B", "(A) (B) (C)") are none.

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
    """1 if the word that the answer settles on is the right one: "Yes, but no." is a no, "Yes, no doubt" a yes, and
    "No, yes" or "not yes" neither.

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
    text = _without_own_texts(answer, options)

    def mentions(*patterns: re.Pattern) -> list[Mention]:
        """Of choices, but not the word "a" at the start of something."""
        found = [_mention(match) for pattern in patterns for match in pattern.finditer(text)]
        article = {mention for mention in found if mention.choice == "A" and _ARTICLE.match(text, mention.end)}
        return [mention for mention in found if mention.choice in letters and mention not in article]

    declared, bracketed = set(mentions(_DECLARED, _CONCLUDED, _ALONE)), set(mentions(_BRACKETED))
    # "I" is a choice only where nothing else can be meant.
    standing = {mention for mention in mentions(_STANDING) if mention.choice != "I"}
    left = stated(declared | bracketed | standing | set(mentions(_FIRST)), text)
    if final := [mention for mention in left if mention in declared]:
        return final[-1].choice
    first = _FIRST.match(text)
    if first and _mention(first) in left and not changes_its_mind(text, first.end()):
        if not any(mention.choice != first["letter"] and _stands_too(mention, text) for mention in left):
            return first["letter"]
    for some in (bracketed, standing):
        if kept := [mention for mention in left if mention in some]:
            return settled(kept, text)
    return _option_in(answer, options)


def stated_word(answer: str, words: Sequence[str]) -> Optional[str]:
    """The word, in lower case, that an answer settles on, or None.

    A word counts where a clause ends with it; in an answer without such a place the first one does. Neither counts
    where it is denied; both words, without a word on which it is, are none.
    """
    either = "|".join(re.escape(word) for word in words)
    text = last_boxed(answer) or answer
    ends = rf"(?=\W{{0,4}}(?:[.,;:!?)*\n/]|\Z|(?:or|and|{either})\b))"

    def mentions(pattern: str) -> list[Mention]:
        found = re.finditer(pattern, text, re.IGNORECASE)
        return [Mention(match.start(), match.end(), match[0].casefold()) for match in found]

    if ending := mentions(rf"\b(?:{either})\b{ends}"):
        left = stated(ending, text)
        final = [mention for mention in left if _declares(text, mention.start)]
        return final[-1].choice if final else settled(left, text)
    left = stated(mentions(rf"\b(?:{either})\b"), text)
    return left[0].choice if left else None


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
    """The option whose text the answer states, the last one that it declares to be the answer or the only one."""
    text, found = _folded(answer), []
    for number, option in enumerate(options[:_MANY]):
        if wanted := _folded(option):
            places = re.finditer(rf"(?<!\w){re.escape(wanted)}(?!\w)", text)
            found += [Mention(match.start(), match.end(), chr(ord("A") + number)) for match in places]
    whole, furthest = [], 0
    for mention in sorted(found, key=lambda mention: (mention.start, -mention.end)):
        if mention.end > furthest:  # else it is a part of a longer one
            whole.append(mention)
            furthest = mention.end
    left = stated(whole, text)
    final = [mention for mention in left if _declares(text, mention.start)]
    return final[-1].choice if final else settled(left, text)


def _without_own_texts(answer: str, options: Sequence[str]) -> str:
    """An answer of the same length where dots are instead of an option's text behind its own letter: "A. ......"."""
    for number, option in enumerate(options[:_MANY]):
        if words := [re.escape(word) for word in option.strip(" .").split()]:
            letter, own = chr(ord("A") + number), r"\s{1,4}".join(words)
            pattern = rf"(?<![A-Za-z0-9'’\\])({letter}[\W_]{{1,6}})((?i:{own}))(?!\w)"
            answer = re.sub(pattern, lambda match: match[1] + "…" * len(match[2]), answer)
    return answer


def _mention(match: re.Match) -> Mention:
    group = "letter" if match["letter"] else "before"
    return Mention(*match.span(group), match[group])


def _declares(text: str, start: int) -> bool:
    """Whether what begins there is declared to be the answer."""
    return _DECLARES.search(text[max(0, start - 40) : start].casefold()) is not None


def _stands_too(mention: Mention, text: str) -> bool:
    before = text[max(0, mention.start - 20) : mention.start]
    return _STANDS_TOO.search(before) is not None and not _IS_SUBJECT.match(text, mention.end)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .")
