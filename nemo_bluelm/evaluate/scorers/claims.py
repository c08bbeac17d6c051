"""Which of the choices that an answer mentions it states: not those that it rules out, asks about or lists."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Optional

_WINDOW = 80  # characters before or after a mention that say what is made of it
_MENTIONS = 2000  # the last ones count
_NOT = (
    r"(?:\b(?:not|cannot|never|neither|nor|unlike|rather\s{1,4}than|instead\s{1,4}of|rul(?:e|es|ed|ing)\s{1,4}out"
    r"|exclud(?:e|es|ed|ing)|eliminat(?:e|es|ed|ing)|reject(?:s|ed)?|(?:any|every)thing\s{1,4}but)\b|n['’]t\b"
    r"|不是|并非|不选|不会是|不可能是|不能是|排除)"
)
_FILL = (
    r"(?:\s{1,4}(?:be|been|is|it|it['’]s|that|the|an?|option|choice|answer|letter|number|value|correct|right|true"
    r"|likely|think|believe|say|either|necessarily|really|exactly|simply|just|equals?|to)\b){0,6}"
)
_MARKS = r"[\s:：\"'“‘*_`$(\[{（\\]{0,8}"
_WRONG = r"(?:wrong|incorrect|false|impossible|excluded|eliminated|ruled\s{1,4}out|out)\b"
_BEFORE = re.compile(rf"{_NOT}{_FILL}{_MARKS}\Z", re.IGNORECASE)
_AFTER = re.compile(
    r"[\"'”’)\]}*_`$）]{0,4}(?:[\s(（:：]{0,3}…{1,400}[)）]?)?(?:\s{1,4}(?:option|choice|answer)\b)?(?:"
    r"\s{1,4}(?:is|are|was|were|does|do|can|could|would|seems|looks)(?:\s{1,4}not\b|n['’]t\b)|\s{1,4}cannot\b"
    rf"|\s{{1,4}}(?:is|are|was|were|seems|looks)\s{{1,4}}(?:\w{{2,12}}ly\s{{1,4}}|also\s{{1,4}})?{_WRONG}"
    rf"|\s{{0,4}}[:：-]\s{{0,4}}(?:no\b|not\b|{_WRONG})|\s{{0,4}}(?:不对|不正确|不符合|不是正确|错))",
    re.IGNORECASE,
)
_ASKED = re.compile(r"[\"'”’)\]}*_`$）]{0,4}\s{0,4}[?？]")
_OR = re.compile(
    r"[\W_]{0,8}…*(?:[/&|+]|\b(?:(?:or|and)(?:\s{1,4}(?:also|maybe|possibly|perhaps))?|also|as\s{1,4}well\s{1,4}as)\b|或者?|和|与|及)[\W_]{0,8}",
    re.IGNORECASE,
)
_NEXT_TO = re.compile(r"(?:[^\w?？…]|_){0,12}…*(?:[^\w?？…]|_){0,12}")
_LINE_ENDS = re.compile(r"[^\w\n…]{0,8}…*[^\w\n]{0,8}(?:\n|\Z)")
_CLAUSE = re.compile(r"[\"'”’)\]}*_`$）]{0,4}(?:\s{1,4}[a-z]|[\u4e00-\u9fff])")  # the mention is its subject
_AND = re.compile(r"[\"'”’)\]}*_`$）]{0,4}\s{1,4}(?:and|or)\b")
_SECOND_THOUGHTS = re.compile(r"\b(?:wait|actually|rather|instead|correction|sorry|but|no)\b", re.IGNORECASE)

_NUMBER = (
    r"(?:\$[^$\n]{1,200}\$|\\\([^\n]{1,200}?\\\)|\\d?frac\{[^{}]{1,40}\}\{[^{}]{1,40}\}"
    r"|[-+]?\d{1,400}(?:[.,/]\d{1,400}){0,8})"
)
_NUMBER_AFTER_NOT = re.compile(
    rf"(?:(?:{_NOT}|\bno\b){_FILL}[\s:\"'“‘*_`(]{{0,8}}(?:[a-z]\s{{0,4}}=\s{{0,4}})?|(?:≠|\\neq?\b|!=)\s{{0,4}}){_NUMBER}",
    re.IGNORECASE,
)
_NUMBER_BEFORE_NOT = re.compile(
    rf"(?<![\d.,]){_NUMBER}\s{{1,4}}(?:is|was)(?:\s{{1,4}}(?:not|never)|n['’]t)\s{{1,4}}(?:the\s{{1,4}}|an?\s{{1,4}})?"
    rf"(?:correct|right|answer|solution)\b|(?<![\d.,]){_NUMBER}\s{{1,4}}(?:is|was)\s{{1,4}}{_WRONG}",
    re.IGNORECASE,
)


class Mention(NamedTuple):
    """Of a choice, at characters start to end of an answer."""

    start: int
    end: int
    choice: str


def stated(mentions: Iterable[Mention], text: str) -> list[Mention]:
    """The mentions, in their order, without those that are ruled out ("not A", "A is wrong") or part of a list of
    several choices ("A or B", "(A) (B) (C)").

    Args:
        text: the answer, where "…" may be instead of characters that make no difference.
    """
    ordered = sorted(set(mentions))[-_MENTIONS:]
    out = {mention.start for mention in ordered if _ruled_out(mention, text)}
    runs: list[list[Mention]] = []
    for mention in ordered:
        last = runs[-1][-1] if runs else None
        ends = last is not None and last.start in out and re.search("[;.!；。]", text[last.end : mention.start])
        if last is not None and not ends and _is_list(last, mention, text):
            runs[-1].append(mention)
        else:
            runs.append([mention])
    single = [run for run in runs if len({mention.choice for mention in run}) == 1]
    return [mention for run in single for mention in run if mention.start not in out]


def settled(mentions: Sequence[Mention], text: str) -> Optional[str]:
    """The choice that mentions agree on, or the last one where the answer changes its mind before it.

    Args:
        mentions: as ``stated`` gives them.

    Returns:
        None where there is no mention, or several choices stay open.
    """
    sure = [mention for mention in mentions if not _ASKED.match(text, mention.end)] or mentions
    if not sure:
        return None
    last = sure[-1]
    others = [mention for mention in sure if mention.choice != last.choice]
    if not others or _SECOND_THOUGHTS.search(text, others[-1].end, _first_after(sure, others[-1]).start):
        return last.choice
    return None


def changes_its_mind(text: str, start: int) -> bool:
    """Whether there are second thoughts after a place in an answer."""
    return _SECOND_THOUGHTS.search(text, start) is not None


def without_denied_numbers(text: str) -> str:
    """An answer without the numbers and formulas that it says it is not: "It is not 7 but 8" becomes "It is  but 8"."""
    return _NUMBER_BEFORE_NOT.sub(" ", _NUMBER_AFTER_NOT.sub(" ", text))


def _first_after(mentions: Sequence[Mention], one: Mention) -> Mention:
    return next(mention for mention in mentions if mention.start > one.start)


def _ruled_out(mention: Mention, text: str) -> bool:
    before = text[max(0, mention.start - _WINDOW) : mention.start]
    return _BEFORE.search(before) is not None or _AFTER.match(text, mention.end) is not None


def _is_list(one: Mention, other: Mention, text: str) -> bool:
    """Whether nothing that makes a difference stands between two mentions."""
    if _OR.fullmatch(text, one.end, other.start):
        return True
    between = text[one.end : other.start]
    if not _NEXT_TO.fullmatch(between) or re.search(r"[:：]\W{0,4}\Z", between):
        return False
    if _CLAUSE.match(text, other.end) and (re.search("[.!。]", between) or not _AND.match(text, other.end)):
        return False
    if "\n" not in between:
        return True
    line = text[text.rfind("\n", 0, one.start) + 1 : one.start]  # a line each
    return not re.search(r"\w", line) and _LINE_ENDS.match(text, other.end) is not None
