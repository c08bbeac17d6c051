"""Filters of text: datatrove's Gopher and C4 rules fitted to Chinese and English, and small ones of our own."""

import re
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING

from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.filters.gopher_repetition_filter import find_all_duplicate
from datatrove.utils.word_tokenizers import WORD_TOKENIZER_FACTORY, WordTokenizer

from nemo_bluelm.data.curate import words

if TYPE_CHECKING:
    from nemo_bluelm.data.curate import steps

WORDS = "nemo_bluelm"  # the name of our tokenizer in datatrove, whose own ones need models or further packages


class Words(WordTokenizer):
    """Our words and sentences behind datatrove's interface."""

    def word_tokenize(self, text: str) -> list[str]:
        return words.tokens(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return words.sentences(text)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        spans, at = [], 0
        for sentence in words.sentences(text):
            at = text.index(sentence, at)
            spans.append((at, at + len(sentence)))
            at += len(sentence)
        return spans


WORD_TOKENIZER_FACTORY[WORDS] = Words


class ByLanguage(BaseFilter):
    """One filter for Chinese texts and one for all others."""

    def __init__(self, chinese: BaseFilter, others: BaseFilter, dropped):
        super().__init__(dropped)
        self.chinese, self.others = chinese, others

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return (self.chinese if words.is_chinese(doc.text) else self.others).filter(doc)


class PlainText(BaseFilter):
    """A filter for plain text; conversations pass."""

    def __init__(self, inner: BaseFilter, dropped):
        super().__init__(dropped)
        self.inner = inner

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return "text" not in doc.metadata["record"] or self.inner.filter(doc)


def gopher_repetition(step: "steps.GopherRepetition", dropped) -> BaseFilter:
    rules = GopherRepetitionFilter(
        dup_line_frac=step.max_duplicate_lines,
        dup_line_char_frac=step.max_duplicate_line_characters,
        dup_para_frac=step.max_duplicate_paragraphs,
        dup_para_char_frac=step.max_duplicate_paragraph_characters,
        language=WORDS,
    )
    return PlainText(rules, dropped)


def gopher_quality(step: "steps.GopherQuality", dropped) -> BaseFilter:
    common = dict(
        min_doc_words=step.min_words,
        max_doc_words=step.max_words,
        min_stop_words=step.min_stop_words,
        max_symbol_word_ratio=step.max_symbol_word_ratio,
        max_bullet_lines_ratio=step.max_bullet_lines,
        max_ellipsis_lines_ratio=step.max_ellipsis_lines,
        max_non_alpha_words_ratio=step.min_alpha_words,
        language=WORDS,
    )
    chinese = GopherQualityFilter(
        **common, stop_words=list(words.CHINESE_STOP_WORDS), min_avg_word_length=None, max_avg_word_length=None
    )
    return PlainText(ByLanguage(chinese, GopherQualityFilter(**common), None), dropped)


def c4_quality(step: "steps.C4Quality", dropped) -> BaseFilter:
    common = dict(min_num_sentences=step.min_sentences, filter_curly_bracket=step.curly_brackets, language=WORDS)
    # datatrove knows no Chinese full stop, and counts words by spaces.
    chinese = C4QualityFilter(**common, filter_no_terminal_punct=False, min_words_per_line=-1)
    others = C4QualityFilter(
        **common, filter_no_terminal_punct=step.end_punctuation, min_words_per_line=step.min_words_per_line
    )
    return PlainText(ByLanguage(chinese, others, None), dropped)


class LengthFilter(BaseFilter):
    def __init__(self, step: "steps.Length", dropped):
        super().__init__(dropped)
        self.step = step

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        count = len(words.words(doc.text))
        if count < self.step.min:
            return False, "too_short"
        return (False, "too_long") if count > self.step.max else True


class LanguageFilter(BaseFilter):
    def __init__(self, step: "steps.Language", dropped):
        super().__init__(dropped)
        self.step = step

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        found = words.words(doc.text)
        if len(found) < self.step.min_words:
            return True
        language = words.language(found)
        return language in self.step.allow or (False, f"language_{language}")


class CharactersFilter(BaseFilter):
    def __init__(self, step: "steps.Characters", dropped):
        super().__init__(dropped)
        self.step = step

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        counts = Counter("".join(doc.text.split()))
        total = counts.total()
        if not total:
            return False, "empty"
        broken = sum(n for c, n in counts.items() if c == "\ufffd" or unicodedata.category(c) in ("Cc", "Co", "Cn"))
        if broken / total > self.step.max_broken:
            return False, "broken_characters"
        symbols = sum(n for c, n in counts.items() if not c.isalnum() and not unicodedata.category(c).startswith("M"))
        return symbols / total <= self.step.max_symbols or (False, "symbols")


class RepetitionFilter(BaseFilter):
    def __init__(self, step: "steps.Repetition", dropped):
        super().__init__(dropped)
        self.step = step
        self.run_of_one = re.compile(r"(\S)\1{%d,}" % step.max_run)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self.run_of_one.search(doc.text):
            return False, "character_run"
        found = words.words(doc.text)
        share = find_all_duplicate(found, self.step.n) / max(1, len("".join(found)))
        return share <= self.step.max_share or (False, "repeated_words")
