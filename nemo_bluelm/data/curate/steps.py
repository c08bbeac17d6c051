"""The steps that a curation recipe may name, as dataclasses of their parameters. datatrove is imported on building."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from nemo_bluelm.errors import UserError


class Step:
    """What a recipe's step is made of. ``images``: what it must know of a record's images."""

    images: ClassVar[frozenset[str]] = frozenset()


class Filter(Step, ABC):
    """A step that judges, and may change, one record at a time."""

    @abstractmethod
    def build(self, dropped):
        """The datatrove filter; ``dropped`` takes what it removes, or is None."""


class Dedup(Step, ABC):
    """A step that compares all records: sign each, match the signatures, remove the copies."""

    @abstractmethod
    def sign(self, folder: str):
        """Writes signatures below ``folder``; the end of a pipeline."""

    @abstractmethod
    def match(self, folder: str) -> list[tuple[str, int, list]]:
        """(name, tasks, pipeline) of the stages between signing and removing."""

    @abstractmethod
    def remove(self, folder: str, dropped):
        """The filter behind the stages of :meth:`match`."""


@dataclass
class Length(Filter):
    """All text of the record, in words; a Chinese character is a word."""

    min: int = 20
    max: int = 100_000

    def build(self, dropped):
        from nemo_bluelm.data.curate.text_filters import LengthFilter

        return LengthFilter(self, dropped)


@dataclass
class Language(Filter):
    """Texts of fewer than ``min_words`` words pass: rules can't tell."""

    allow: list[str] = field(default_factory=lambda: ["zh", "en"])
    min_words: int = 20

    def __post_init__(self):
        if unknown := sorted(set(self.allow) - {"zh", "en", "other"}):
            raise UserError(f"allow has {unknown[0]!r}; the rules know zh, en and other")

    def build(self, dropped):
        from nemo_bluelm.data.curate.text_filters import LanguageFilter

        return LanguageFilter(self, dropped)


@dataclass
class Characters(Filter):
    """``max_symbols``: neither letter, digit nor space; ``max_broken``: control and replacement characters."""

    max_symbols: float = 0.4
    max_broken: float = 0.005

    def build(self, dropped):
        from nemo_bluelm.data.curate.text_filters import CharactersFilter

        return CharactersFilter(self, dropped)


@dataclass
class Repetition(Filter):
    """For short texts (captions, answers): characters in repeated n-grams of words, and runs of one character."""

    n: int = 3
    max_share: float = 0.5
    max_run: int = 40

    def __post_init__(self):
        _check_positive(self, "n", "max_run")

    def build(self, dropped):
        from nemo_bluelm.data.curate.text_filters import RepetitionFilter

        return RepetitionFilter(self, dropped)


@dataclass
class GopherRepetition(Filter):
    """Table A1 of arXiv 2112.11446; for plain text, as are the next two."""

    max_duplicate_lines: float = 0.3
    max_duplicate_line_characters: float = 0.2
    max_duplicate_paragraphs: float = 0.3
    max_duplicate_paragraph_characters: float = 0.2

    def build(self, dropped):
        from nemo_bluelm.data.curate.text_filters import gopher_repetition

        return gopher_repetition(self, dropped)


@dataclass
class GopherQuality(Filter):
    """Quality rules of arXiv 2112.11446; word lengths and stop words of Chinese for Chinese texts."""

    min_words: int = 50
    max_words: int = 100_000
    min_stop_words: int = 2
    max_symbol_word_ratio: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alpha_words: float = 0.8

    def build(self, dropped):
        from nemo_bluelm.data.curate.text_filters import gopher_quality

        return gopher_quality(self, dropped)


@dataclass
class C4Quality(Filter):
    """Rules of C4 (arXiv 1910.10683): removes bad lines from a text, and texts with too few sentences left."""

    min_sentences: int = 5
    min_words_per_line: int = 3
    end_punctuation: bool = True
    curly_brackets: bool = True  # refuse texts with one

    def build(self, dropped):
        from nemo_bluelm.data.curate.text_filters import c4_quality

        return c4_quality(self, dropped)


@dataclass
class Answer(Filter):
    """The last reply isn't empty. ``refuse``: regular expressions that a whole answer must not match, case ignored."""

    min_words: int = 0
    max_words: int = 4096
    refuse: list[str] = field(default_factory=lambda: [r"n/?a\.?", "none", "null", "unknown"])

    def __post_init__(self):
        for pattern in self.refuse:
            check_pattern("refuse", pattern)

    def build(self, dropped):
        from nemo_bluelm.data.curate.record_filters import AnswerFilter

        return AnswerFilter(self, dropped)


@dataclass
class ImageSize(Filter):
    """Pixels, after EXIF rotation, from the header."""

    images: ClassVar[frozenset[str]] = frozenset({"size"})
    min_side: int = 28
    max_side: int = 16_000
    max_aspect: float = 20.0

    def build(self, dropped):
        from nemo_bluelm.data.curate.record_filters import ImageSizeFilter

        return ImageSizeFilter(self, dropped)


_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"


@dataclass
class ClickInside(Filter):
    """Points and boxes that ``pattern`` finds in the replies of records tagged ``tag`` lie inside the last image.

    ``pattern`` has two groups (x, y) or four (x1, y1, x2, y2; the last two may be absent). Coordinates run from 0 to
    ``scale``; 0 means pixels.
    """

    images: ClassVar[frozenset[str]] = frozenset({"size"})
    tag: str = "gui"
    pattern: str = rf"[\[(]{_NUMBER},{_NUMBER}(?:,{_NUMBER},{_NUMBER})?[\])]"
    scale: float = 1000.0
    required: bool = True  # a record without any is removed

    def __post_init__(self):
        if check_pattern("pattern", self.pattern).groups not in (2, 4):
            raise UserError(f"pattern is {self.pattern!r}; it must have two or four groups")

    def build(self, dropped):
        from nemo_bluelm.data.curate.record_filters import ClickInsideFilter

        return ClickInsideFilter(self, dropped)


@dataclass
class Tags(Filter):
    """Adds a tag where its regular expressions match ``min_matches`` times or more, all of them counted together."""

    rules: dict[str, list[str]] = field(default_factory=dict)
    min_matches: int = 1
    ignore_case: bool = True

    def __post_init__(self):
        for tag, patterns in self.rules.items():
            for pattern in patterns:
                check_pattern(f"rules.{tag}", pattern)

    def build(self, dropped):
        from nemo_bluelm.data.curate.record_filters import Tagger

        return Tagger(self)


@dataclass
class _SameKey(Dedup):
    """Records with the same key are copies; the one of the first task, and the first in it, stays."""

    tasks: int = 1  # of the matching stage
    key: ClassVar[str] = ""

    def __post_init__(self):
        _check_positive(self, "tasks")

    def sign(self, folder):
        from nemo_bluelm.data.curate.dedup import sign_key

        return sign_key(self.key, folder, self.tasks)

    def match(self, folder):
        from nemo_bluelm.data.curate.dedup import match_keys

        return [("match", self.tasks, [match_keys(folder)])]

    def remove(self, folder, dropped):
        from nemo_bluelm.data.curate.dedup import remove_keys

        return remove_keys(folder, dropped)


@dataclass
class TextDedup(_SameKey):
    """The same text, but for case and space."""

    key: ClassVar[str] = "text"


@dataclass
class ImageDedup(_SameKey):
    """The same image files, whatever the text: for captions, not where one image has many questions."""

    images: ClassVar[frozenset[str]] = frozenset({"digest"})
    key: ClassVar[str] = "images"


@dataclass
class PairDedup(_SameKey):
    """The same image files and the same text."""

    images: ClassVar[frozenset[str]] = frozenset({"digest"})
    key: ClassVar[str] = "pair"


@dataclass
class MinhashDedup(Dedup):
    """Near copies of texts: n-grams of words, ``buckets`` bands of ``hashes`` MinHashes.

    Two texts of Jaccard similarity s are found with probability 1 - (1 - s**hashes)**buckets.
    """

    ngrams: int = 5
    buckets: int = 14
    hashes: int = 8

    def __post_init__(self):
        _check_positive(self, "ngrams", "buckets", "hashes")

    def sign(self, folder):
        from nemo_bluelm.data.curate.dedup import sign_minhash

        return sign_minhash(self, folder)

    def match(self, folder):
        from nemo_bluelm.data.curate.dedup import match_minhash

        return match_minhash(self, folder)

    def remove(self, folder, dropped):
        from nemo_bluelm.data.curate.dedup import remove_listed

        return remove_listed(folder, dropped)


@dataclass
class NearImageDedup(Dedup):
    """Images whose 256-bit difference hashes differ in ``max_distance`` bits or fewer.

    A record goes when each of its images is near one of an earlier record. ``same_text``: only among records of the
    same text.
    """

    images: ClassVar[frozenset[str]] = frozenset({"hash"})
    max_distance: int = 7
    same_text: bool = False

    def __post_init__(self):
        if not 0 <= self.max_distance <= 15:
            raise UserError(f"max_distance is {self.max_distance}; it must be 0 to 15 of the hash's 256 bits")

    def sign(self, folder):
        from nemo_bluelm.data.curate.near_images import SignImages

        return SignImages(folder, self.same_text)

    def match(self, folder):
        from nemo_bluelm.data.curate.near_images import MatchImages

        return [("match", 1, [MatchImages(folder, self.max_distance)])]

    def remove(self, folder, dropped):
        from nemo_bluelm.data.curate.dedup import remove_listed

        return remove_listed(folder, dropped)


STEPS: dict[str, Callable[..., Step]] = {
    "length": Length,
    "language": Language,
    "characters": Characters,
    "repetition": Repetition,
    "gopher_repetition": GopherRepetition,
    "gopher_quality": GopherQuality,
    "c4_quality": C4Quality,
    "answer": Answer,
    "image_size": ImageSize,
    "click_inside": ClickInside,
    "tags": Tags,
    "text_dedup": TextDedup,
    "image_dedup": ImageDedup,
    "pair_dedup": PairDedup,
    "minhash_dedup": MinhashDedup,
    "near_image_dedup": NearImageDedup,
}


def _check_positive(step: Step, *names: str) -> None:
    for name in names:
        if getattr(step, name) < 1:
            raise UserError(f"{name} is {getattr(step, name)}; it must be 1 or more")


def check_pattern(key: str, pattern: str) -> re.Pattern:
    """The compiled regular expression, or a UserError that names its key."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key} has {pattern!r}, no regular expression: {error}") from error
