"""Token ids as text that can be shown one token at a time: byte fragments joined, invisible characters made visible."""

import unicodedata
from collections.abc import Sequence

from markupsafe import Markup, escape

from nemo_bluelm.data.tokenizer import Tokenizer

# Special token -> what it is to a reader; the kind is the class of its chip.
SPECIAL_KINDS = {
    **dict.fromkeys(("pad", "bos", "eos", "im_start", "image", "im_end"), "plain"),
    **dict.fromkeys(("human", "ai"), "role"),
    "blue_think": "control",
    **dict.fromkeys(("think", "think_end"), "think"),
}
_MARKS = {"\n": "\u21b5", "\t": "\u2192"}
_LONGEST_CHARACTER = 4  # bytes of UTF-8, so tokens too


def special_kinds(tokenizer: Tokenizer) -> dict[int, str]:
    """Kind of each special token, by id."""
    return {getattr(tokenizer, name): kind for name, kind in SPECIAL_KINDS.items()}


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str | None]:
    """The text of each token, None for one that only ends a character which an earlier one begins.

    Tokens are decoded beside the ones before them, as a decoder may treat the first token of a text differently.
    """
    special = special_kinds(tokenizer)
    texts: list[str | None] = []
    first = shown = 0  # the window ids[first:shown] is decoded already, ids[shown:] waits for a whole character
    for at, token in enumerate(ids):
        if token in special:
            _flush(texts, ids[shown:at], tokenizer)
            texts.append(tokenizer.decode([token]))
            first = shown = at + 1
            continue
        before = tokenizer.decode(ids[first:shown])
        text = tokenizer.decode(ids[first : at + 1])[len(before) :]
        if text.endswith("\ufffd") and at + 1 - shown < _LONGEST_CHARACTER:
            continue
        texts += [text] + [None] * (at - shown)
        first, shown = shown, at + 1
    _flush(texts, ids[shown:], tokenizer)
    return texts


def visible(text: str) -> Markup:
    """``text`` as HTML: markup inert; newlines, tabs, control and direction characters shown by a mark."""
    return Markup("".join(_shown(char) for char in text))


def _flush(texts: list[str | None], ids: Sequence[int], tokenizer: Tokenizer) -> None:
    if ids:
        texts += [tokenizer.decode(ids)] + [None] * (len(ids) - 1)


def _shown(char: str) -> str:
    if char in _MARKS:
        return f"<span class=n>{_MARKS[char]}</span>{char}"
    if char.isprintable() or unicodedata.category(char) == "Zs":
        return escape(char)
    # It would not be seen, or would turn the text around it.
    return f"<span class=n>\u2039U+{ord(char):04X}\u203a</span>"
