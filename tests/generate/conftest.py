"""Makes the oracles importable and hands out Megatron's world."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))  # also under pytest's importlib mode

import pytest  # noqa: E402
from megatron_world import world  # noqa: E402, F401

from nemo_bluelm.data.tokenizer import Tokenizer, train_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["what is seven of nine? describe the picture"], 300, path)
    return Tokenizer.load(path)
