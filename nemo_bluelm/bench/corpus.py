"""The corpus that training is measured on: real text and photos as WebDataset shards, made without a network.

- ``text-S-*.tar``: plain texts of exactly S tokens, so that a pack of S tokens is one document.
- ``docs-*.tar``: plain texts of all lengths.
- ``images-*.tar``: questions about photos of four common sizes.
- ``tokenizer.json``: trained on the texts.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nemo_bluelm.atomic import new_folder
from nemo_bluelm.data.tokenizer import Tokenizer, train_tokenizer
from nemo_bluelm.data.writer import RawSample, question_record, write_split
from nemo_bluelm.errors import UserError

DEFAULT = Path("outputs/bench/corpus")  # data.root of recipes/bench
LENGTHS = (4096, 8192, 32768)
TEXT_TOKENS = 393_216  # of each length; a run that needs more goes through them again in another order
DOC_BYTES = 700_000
IMAGES = 12
VOCABULARY = 16_384
_BYTES_PER_TOKEN = 5  # more than the tokenizer needs
_QUESTIONS = ("What does the picture show?", "Describe the image.", "What do you see here?", "Which scenes are these?")
_ANSWER = (
    "It is a mosaic of {width} by {height} pixels: several photographs of different scenes, laid over one another, "
    "each a crop with its own light and colours. Number {number} of the series."
)


def make_corpus(
    out: Path,
    lengths: Sequence[int] = LENGTHS,
    text_tokens: int = TEXT_TOKENS,
    images: int = IMAGES,
    vocab_size: int = VOCABULARY,
    seed: int = 7,
) -> dict:
    """Write the corpus into the new folder ``out``: it is there whole or not at all, and the same every time.

    Args:
        lengths: S of the ``text-S`` shards, in tokens.
        text_tokens: of each of them, rounded up to a whole text.
        images: photos; 350 KB each on average.
        vocab_size: of the tokenizer; the model's own vocabulary may be larger.

    Returns:
        ``samples`` by kind of shard, ``bytes`` in all, ``vocab_size``.

    Raises:
        UserError: ``out`` exists and isn't an empty folder, or can't be written; a package that ships data is missing.
    """
    with new_folder(Path(out)) as partial:
        try:
            from nemo_bluelm.bench.images import make_images
            from nemo_bluelm.bench.text import long_text

            text = long_text(text_tokens * _BYTES_PER_TOKEN)
            photos = make_images(images, seed)
        except ImportError as error:
            raise UserError(f"the corpus needs {error.name}; pip install scikit-learn scikit-image") from error
        train_tokenizer([text], vocab_size, partial / "tokenizer.json")
        tokenizer = Tokenizer.load(partial / "tokenizer.json")
        samples = {f"text-{length}": _exact(text, length, text_tokens, tokenizer) for length in sorted(set(lengths))}
        samples["docs"] = _documents(text, np.random.default_rng([seed, 1]))
        samples["images"] = _questions(photos)
        for name, made in samples.items():
            write_split(partial, name, made, shards=2)
        size = sum(file.stat().st_size for file in partial.iterdir())
    counts = {name: len(made) for name, made in samples.items()}
    return {"samples": counts, "bytes": size, "vocab_size": tokenizer.vocab_size}


def _exact(text: str, length: int, tokens: int, tokenizer: Tokenizer) -> list[RawSample]:
    """Consecutive pieces of the text, each of ``length`` tokens with the two that begin and end a document."""
    made, start, wanted = [], 0, length - 2
    for number in range(-(-tokens // length)):
        piece = text[start : start + wanted * _BYTES_PER_TOKEN * 2] or text[: wanted * _BYTES_PER_TOKEN * 2]
        piece = _fitted(piece, wanted, tokenizer)
        start = (start + len(piece)) % len(text)
        made.append(RawSample(f"text-{number:05d}", {"text": piece, "tags": ["text"]}))
    return made


def _fitted(piece: str, wanted: int, tokenizer: Tokenizer) -> str:
    """The beginning of ``piece``, filled up to ``wanted`` tokens with a word of one token."""
    low, high = 0, len(piece)
    while low < high:  # the most characters that fit
        middle = (low + high + 1) // 2
        fits = len(tokenizer.encode(piece[:middle])) <= wanted
        low, high = (middle, high) if fits else (low, middle - 1)
    fitted = piece[:low].rstrip() or "the"
    return fitted + " the" * (wanted - len(tokenizer.encode(fitted)))


def _documents(text: str, rng: np.random.Generator) -> list[RawSample]:
    """Passages of 200 to 12,000 characters, the short ones more often, as documents of a web crawl are."""
    made, start = [], 0
    while start < min(DOC_BYTES, len(text)):
        size = int(200 * 60 ** rng.random())
        passage = text[start : start + size].strip()
        start += size
        if passage:
            made.append(RawSample(f"doc-{len(made):05d}", {"text": passage, "tags": ["text"]}))
    return made


def _questions(photos: list[bytes]) -> list[RawSample]:
    from nemo_bluelm.bench.images import SIZES

    made = []
    for number, data in enumerate(photos):
        width, height = SIZES[number % len(SIZES)]
        answer = _ANSWER.format(width=width, height=height, number=number)
        record = question_record(_QUESTIONS[number % len(_QUESTIONS)], answer, None, "0.jpg", ["images"])
        made.append(RawSample(f"image-{number:05d}", record, {"0.jpg": data}))
    return made
