"""The tokenizer: byte-level BPE with the chat's special tokens, trained or loaded from a tokenizer.json."""

import hashlib
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nemo_bluelm.data.files import Files, NotFound
from nemo_bluelm.errors import UserError

# Attribute of a Tokenizer -> the token.
SPECIAL_NAMES = {
    "pad": "<pad>",
    "bos": "<s>",
    "eos": "</s>",
    "human": "[|Human|]:",
    "ai": "[|AI|]:",
    "im_start": "<im_start>",
    "image": "<image>",
    "im_end": "<im_end>",
    "blue_think": "[|BlueThink|]",
    "think": "<think>",
    "think_end": "</think>",
}
SPECIAL_TOKENS = tuple(SPECIAL_NAMES.values())  # tokenizers we train give them the ids 0, 1, 2, ... in this order


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE on ``texts`` and write it to ``path`` (one JSON file, replaced in one step).

    Digits are split one by one, so a number is read digit by digit; bytes are the alphabet, so nothing is unknown.
    The same texts give the same file.

    Args:
        vocab_size: largest vocabulary, special tokens and the 256 bytes included; few texts may give fewer.

    Raises:
        UserError: ``vocab_size`` has no room for the special tokens and the bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest:
        raise UserError(f"vocab_size is {vocab_size}; the special tokens and the bytes alone need {smallest}")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(bpe.to_str(pretty=True), encoding="utf-8")
    os.replace(partial, path)


class Tokenizer:
    """Text to ids and back; special tokens are attributes (``.bos``, ``.image``, ...), never found in text.

    Text that merely looks like a special token (a user types ``</s>``) is encoded as ordinary text, so no user can
    forge a turn, an image or a thought.

    Attributes:
        path: the file or URL it was read from.
        digest: SHA-256 (hex) of that file.
    """

    path: str
    digest: str

    pad: int
    bos: int
    eos: int
    human: int
    ai: int
    im_start: int
    image: int
    im_end: int
    blue_think: int
    think: int
    think_end: int

    def __init__(self, bpe: tokenizers.Tokenizer, path: str, content: bytes):
        """Use :meth:`load`; ``content`` is that of the file."""
        missing = [token for token in SPECIAL_TOKENS if bpe.token_to_id(token) is None]
        if missing:
            raise UserError(f"{path} lacks the special tokens {' '.join(missing)}; add them or train a new tokenizer")
        added = {token.content: token for token in bpe.get_added_tokens_decoder().values()}
        plain = [token for token in SPECIAL_TOKENS if token not in added or not added[token].special]
        if plain:
            raise UserError(f'{path} holds {" ".join(plain)} as ordinary tokens; mark them "special": true')
        # Not stored in tokenizer.json: it must be set after every load.
        bpe.encode_special_tokens = True
        self._bpe, self.path, self.content = bpe, path, content
        self.digest = hashlib.sha256(content).hexdigest()
        for attribute, token in SPECIAL_NAMES.items():
            setattr(self, attribute, bpe.token_to_id(token))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json of the ``tokenizers`` library, a file or a URL.

        Raises:
            UserError: no such file, not a tokenizer, or a special token is absent (it names which).
        """
        path, files = str(path), Files()
        try:
            content = files.read(path, 0, files.stat(path).size)
        except NotFound as error:
            raise UserError(
                f"tokenizer {path} does not exist or can't be read; set data.root or data.tokenizer, or make the corpus"
            ) from error
        try:
            bpe = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizer.json: {error}") from error
        bpe.no_truncation()  # a file may carry both settings, which would cut and pad documents without a word
        bpe.no_padding()
        return cls(bpe, path, content)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; no special token is added or recognised. Raises UserError for what isn't Unicode."""
        try:
            # `encode` would keep Python's lock all the while, and with it the thread that feeds the GPU.
            return self._bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError:  # what the library makes of a lone surrogate
            raise UserError(f"the text {text!r:.60} is not valid Unicode; remove its lone surrogates") from None

    @cached_property
    def newline(self) -> list[int]:
        """Ids of a line break, which ends every query."""
        return self.encode("\n")

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """Text of ids, special tokens written out unless ``skip_special``."""
        return self._bpe.decode(list(ids), skip_special_tokens=skip_special)

    @cached_property
    def vocab_size(self) -> int:
        return max(self._bpe.get_vocab().values()) + 1  # ids may have gaps
