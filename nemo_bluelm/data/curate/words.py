"""Words, sentences and language of Chinese and English text, by rules: no model, no download."""

import re
from collections import Counter
from collections.abc import Callable, Iterable

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
_KANA_HANGUL = "\u3040-\u30ff\uac00-\ud7af"
_LETTER = rf"[^\W_{_HAN}{_KANA_HANGUL}]"
_WORD = re.compile(rf"[{_HAN}{_KANA_HANGUL}]|{_LETTER}+(?:['’-]{_LETTER}+)*")
_TOKEN = re.compile(rf"[{_HAN}{_KANA_HANGUL}][^\w\s]*|[^\s{_HAN}{_KANA_HANGUL}]+")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\n+")
_IS_HAN = re.compile(f"[{_HAN}]")
_IS_KANA_HANGUL = re.compile(f"[{_KANA_HANGUL}]")
_IS_LATIN = re.compile("[a-zA-Z\u00c0-\u024f]")

ENGLISH_STOP_WORDS = frozenset(
    "a an and are as at be but by can do for from has have he if in is it its not of on or she that the their them"
    " they this to was we were what when which who will with you your".split()
)
CHINESE_STOP_WORDS = ("的", "了", "是", "在", "不", "和", "有", "我", "这", "个", "们", "人")


def tokens(text: str) -> list[str]:
    """What stands between spaces; each Chinese, Japanese or Korean character is a token, with punctuation behind it."""
    return _TOKEN.findall(text)


def words(text: str) -> list[str]:
    """Runs of letters and digits, without punctuation; each Chinese, Japanese or Korean character is a word."""
    return _WORD.findall(text)


def sentences(text: str) -> list[str]:
    """Split behind ``. ! ?`` and space, behind ``。！？`` and at line ends; none is empty."""
    return [part.strip() for part in _SENTENCE.split(text) if part.strip()]


def language(found: Iterable[str]) -> str:
    """``zh``, ``en`` or ``other`` for the words of a text.

    Chinese has Han characters and hardly any kana or hangul, also between English words. English is Latin letters with
    its most frequent words among them; other languages in Latin letters lack those.
    """
    counts = Counter(word.lower() for word in found if not word.isdigit())
    total = counts.total()
    if not total:
        return "other"

    def share(belongs: Callable[[str], object]) -> float:
        return sum(count for word, count in counts.items() if belongs(word)) / total

    latin, han = share(_IS_LATIN.match), share(_IS_HAN.match)
    if han >= 0.2 and share(_IS_KANA_HANGUL.match) < 0.05 and han + latin >= 0.9:
        return "zh"
    english = latin >= 0.9 and share(ENGLISH_STOP_WORDS.__contains__) >= 0.06
    return "en" if english else "other"


def is_chinese(text: str) -> bool:
    return bool(_IS_HAN.search(text)) and language(words(text)) == "zh"
