"""What a reply's tokens mean: thought, answer, and whether the model ended by itself."""

import pytest

from nemo_bluelm.data.tokenizer import Tokenizer, train_tokenizer
from nemo_bluelm.generate.request import Reply


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["seven of nine"], 300, path)
    return Tokenizer.load(path)


@pytest.mark.parametrize(
    "written, thought, answer, finished",
    [
        ([], None, "", False),
        (["eos"], None, "", True),
        (["seven", "eos"], None, "seven", True),
        (["seven"], None, "seven", False),
        (["think", "of", "think_end", "nine", "eos"], "of", "nine", True),
        (["think", "of", "think_end", "nine"], "of", "nine", False),
        (["think", "think_end", "nine", "eos"], "", "nine", True),
        (["think", "of", "think_end", "eos"], "of", "", True),
        (["think", "of", "think_end"], "of", "", False),
        (["think", "of"], "of", "", False),
        (["think", "of", "eos"], "of", "", False),  # ended inside the thought
        (["think"], "", "", False),
        (["think", "of", "think_end", "seven", "think_end", "nine", "eos"], "of", "seven</think>nine", True),
        (["seven", "think", "of", "think_end", "eos"], None, "seven<think>of</think>", True),
        (["think_end", "nine", "eos"], None, "</think>nine", True),
    ],
)
def test_parse(tokenizer, written, thought, answer, finished):
    ids = []
    for piece in written:
        ids += [getattr(tokenizer, piece)] if hasattr(tokenizer, piece) else tokenizer.encode(piece)
    assert Reply.parse(ids, tokenizer) == Reply(thought, answer, finished)
