r"""Whether a text follows an instruction: those of IFEval (arXiv 2311.07911) by their ids, and a few more.

The checks are of what the ids mean in English and in Chinese; where a text is English they agree with IFEval's own.
None uses a regular expression that takes more than linear time, for a text may be hostile.

Further ids: ``length_constraints:number_characters`` {num_characters, relation}, without spaces;
``startend:start_checker`` {start_phrase}; ``punctuation:no_marks`` {marks}; ``detectable_format:numbered_list``
{num_items}. A relation is "at least", "less than", "at most", "more than" or "exactly".
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Optional

from nemo_bluelm.evaluate.scorers import instruction_text

CHECKS: dict[str, Callable[..., bool]] = {}
_CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_CHINESE_CHOICES = ("我的答案是是的。", "我的答案是不是。", "我的答案是不确定。")
_RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at least": lambda found, wanted: found >= wanted,
    "less than": lambda found, wanted: found < wanted,
    "at most": lambda found, wanted: found <= wanted,
    "more than": lambda found, wanted: found > wanted,
    "exactly": lambda found, wanted: found == wanted,
}
_HAN = re.compile(r"[\u3400-\u9fff]")
_QUOTES = (('"', '"'), ("“", "”"), ("「", "」"), ("『", "』"))


class BadInstruction(Exception):
    """An instruction that nobody can check; a mistake of the record, not of the text."""


def follows(text: str, instruction: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a text follows an instruction; an empty one never does.

    Args:
        instruction: its id.
        kwargs: what it says; those that are None don't count.

    Raises:
        BadInstruction: an id that isn't known, or kwargs that make no sense.
    """
    check = CHECKS.get(instruction)
    if check is None:
        raise BadInstruction(f"the instruction {instruction!r} is not known")
    given = {name: value for name, value in kwargs.items() if value is not None}
    try:
        inspect.signature(check).bind(text, **given)
    except TypeError as error:
        raise BadInstruction(f"{instruction}: {error}") from error
    return bool(text.strip()) and check(text, **given)


def _check(name: str) -> Callable:
    def register(check: Callable[..., bool]) -> Callable[..., bool]:
        CHECKS[name] = check
        return check

    return register


def _number(value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        raise BadInstruction(f"{value!r:.40} is no number") from None
    if number < 0:
        raise BadInstruction(f"{value!r} is less than 0")
    return number


def _holds(found: int, relation: Optional[str], wanted: Any) -> bool:
    if relation not in _RELATIONS:
        raise BadInstruction(f"the relation {relation!r} is none of {', '.join(_RELATIONS)}")
    return _RELATIONS[relation](found, _number(wanted))


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise BadInstruction(f"{value!r:.40} is no list of texts")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadInstruction(f"{value!r:.40} is no text")
    return value.strip()


@_check("keywords:existence")
def _existence(text: str, keywords: list[str]) -> bool:
    return all(keyword.casefold() in text.casefold() for keyword in _texts(keywords))


@_check("keywords:frequency")
def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _holds(text.casefold().count(_text(keyword).casefold()), relation, frequency)


@_check("keywords:forbidden_words")
def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    """Words as a whole; Chinese ones wherever they stand, for nothing marks where they begin."""
    for word in _texts(forbidden_words):
        pattern = re.escape(word) if _HAN.search(word) else rf"(?<!\w){re.escape(word)}(?!\w)"
        if re.search(pattern, text, re.IGNORECASE):
            return False
    return True


@_check("keywords:letter_frequency")
def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    if len(_text(letter)) != 1:
        raise BadInstruction(f"{letter!r} is not one letter")
    return _holds(text.lower().count(letter.lower()), let_relation, let_frequency)


@_check("language:response_language")
def _language(text: str, language: str) -> bool:
    code = _text(language).lower()
    if code not in instruction_text.LANGUAGES:
        raise BadInstruction(f"the language {language!r} is not known")
    return instruction_text.is_language(text, code)


@_check("length_constraints:number_sentences")
def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _holds(instruction_text.count_sentences(text), relation, num_sentences)


@_check("length_constraints:number_words")
def _words(text: str, num_words: int, relation: str) -> bool:
    return _holds(len(instruction_text.words(text)), relation, num_words)


@_check("length_constraints:number_characters")
def _characters(text: str, num_characters: int, relation: str) -> bool:
    return _holds(len("".join(text.split())), relation, num_characters)


@_check("length_constraints:number_paragraphs")
def _paragraphs(text: str, num_paragraphs: int) -> bool:
    """They are divided by ``***``."""
    wanted, parts = _number(num_paragraphs), [part.strip() for part in text.split("***")]
    inner = parts[1:-1] if len(parts) > 2 else []
    return all(inner) and sum(map(bool, parts)) == wanted


@_check("length_constraints:nth_paragraph_first_word")
def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """They are divided by empty lines."""
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    number, wanted = _number(nth_paragraph), _text(first_word).lower()
    if len(paragraphs) != _number(num_paragraphs) or not 1 <= number <= len(paragraphs):
        return False
    paragraph = paragraphs[number - 1].lstrip("'\"“‘「*").lower()
    if _HAN.search(wanted):
        return paragraph.startswith(wanted)
    word = re.match(r"[^\s.,?!'\"，。？！、；：:;]*", paragraph)
    return word is not None and word[0] == wanted


@_check("detectable_content:number_placeholders")
def _placeholders(text: str, num_placeholders: int) -> bool:
    """Such as [name], 【姓名】."""
    return len(re.findall(r"\[[^\[\]\n]*\]|【[^【】\n]*】", text)) >= _number(num_placeholders)


@_check("detectable_content:postscript")
def _postscript(text: str, postscript_marker: str) -> bool:
    marker = _text(postscript_marker)
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(known.get(marker, re.escape(marker.lower())), text.lower()) is not None


@_check("detectable_format:number_bullet_lists")
def _bullets(text: str, num_bullets: int) -> bool:
    lines = [line.lstrip() for line in text.split("\n")]
    stars = sum(line.startswith("*") and not line.startswith("**") for line in lines)
    return stars + sum(line.startswith("-") for line in lines) == _number(num_bullets)


@_check("detectable_format:numbered_list")
def _numbered(text: str, num_items: int) -> bool:
    """Lines such as "1. ", "2) ", "3、", numbered from 1."""
    numbers = re.findall(r"^[ \t]{0,8}(\d{1,4})(?:[.)]\s|、|．)", text, re.MULTILINE)
    wanted = _number(num_items)
    return [int(number) for number in numbers] == list(range(1, wanted + 1))


@_check("detectable_format:constrained_response")
def _constrained(text: str) -> bool:
    return any(choice in text for choice in (*_CHOICES, *_CHINESE_CHOICES))


@_check("detectable_format:number_highlighted_sections")
def _highlights(text: str, num_highlights: int) -> bool:
    single = re.findall(r"\*[^\n*]*\*", text)
    double = re.findall(r"\*\*[^\n*]*\*\*", text)
    return sum(bool(mark.strip("* \t")) for mark in [*single, *double]) >= _number(num_highlights)


@_check("detectable_format:multiple_sections")
def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """Such as "Section 1", "第1节" by the mark 第."""
    mark = re.escape(_text(section_spliter))
    return len(re.findall(rf"{mark}\s?(?:\d{{1,9}}|[一二三四五六七八九十]{{1,3}})", text)) >= _number(num_sections)


@_check("detectable_format:json_format")
def _json(text: str) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


@_check("detectable_format:title")
def _title(text: str) -> bool:
    """<<title>>, or 《title》 on a line of its own."""
    for line in text.split("\n"):
        begin, end = line.find("<<"), line.rfind(">>")
        if 0 <= begin < end and line[begin:end].strip("<> \t"):
            return True
        plain = line.strip()
        if plain.startswith("《") and plain.endswith("》") and plain.strip("《》 "):
            return True
    return False


@_check("combination:two_responses")
def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    if not all(parts[1:-1]):
        return False
    said = [part for part in parts if part]
    return len(said) == 2 and said[0] != said[1]


@_check("combination:repeat_prompt")
def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(_text(prompt_to_repeat).lower())


@_check("startend:start_checker")
def _start(text: str, start_phrase: str) -> bool:
    return text.strip().lstrip('"“').lower().startswith(_text(start_phrase).lower())


@_check("startend:end_checker")
def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"”').lower().endswith(_text(end_phrase).lower())


@_check("startend:quotation")
def _quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and any(text[0] == first and text[-1] == last for first, last in _QUOTES)


@_check("change_case:capital_word_frequency")
def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    capitals = sum(word.isupper() for word in re.findall(r"[\w-]+", text))
    return _holds(capitals, capital_relation, capital_frequency)


@_check("change_case:english_capital")
def _upper(text: str) -> bool:
    return text.isupper() and instruction_text.is_latin(text)


@_check("change_case:english_lowercase")
def _lower(text: str) -> bool:
    return text.islower() and instruction_text.is_latin(text)


@_check("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return not any(mark in text for mark in ",，")


@_check("punctuation:no_marks")
def _no_marks(text: str, marks: str) -> bool:
    return not any(mark in text for mark in _text(marks))
