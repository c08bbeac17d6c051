"""The tokenizer of an imported language model: its file with the chat's special tokens, and rows for them."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers
import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from nemo_bluelm.data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from nemo_bluelm.errors import UserError

MULTIPLE = 128  # of a vocabulary that had to grow; Megatron-LM's


def with_special_tokens(path: Path) -> bytes:
    """A tokenizer.json with the special tokens that it lacks behind its own; unchanged where it lacks none.

    Raises:
        UserError: the file is missing, or no tokenizer.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} can't be read: {error.strerror}; save the model's tokenizer there (transformers: "
            "AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIR))"
        ) from error
    try:
        found = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a tokenizer.json: {error}; fetch it again") from error
    added = {token["content"]: token["special"] for token in json.loads(content).get("added_tokens", ())}
    lacking = [token for token in SPECIAL_TOKENS if not added.get(token)]
    if not lacking:
        return content
    found.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in lacking])
    return found.to_str(pretty=True).encode()


def without_language() -> bytes:
    """The tokenizer of a checkpoint that has no language model: bytes and special tokens; no weight depends on it."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        train_tokenizer([], len(SPECIAL_TOKENS) + len(pre_tokenizers.ByteLevel.alphabet()), path)
        return path.read_bytes()


def vocabulary(rows: int, content: bytes) -> int:
    """Size of the vocabulary of a model with this many rows and a tokenizer of this content.

    Raises:
        UserError: the tokenizer is unfit for training.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_bytes(content)
        tokens = Tokenizer.load(path).vocab_size
    return rows if tokens <= rows else -(-tokens // MULTIPLE) * MULTIPLE


def new_rows(weight: Tensor, count: int) -> Tensor:
    """[count, hidden], each the mean row: an unseen token is then as likely as the others on average."""
    mean = torch.zeros(weight.size(1), dtype=torch.float64)
    for rows in weight.split(4096):
        mean += rows.double().sum(0)
    return (mean / weight.size(0)).to(weight.dtype).expand(count, -1)
