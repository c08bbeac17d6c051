"""A tokenizer and the corpus for the tests of reports."""

import pytest

from nemo_bluelm.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(corpus) -> Tokenizer:
    return Tokenizer.load(corpus / "tokenizer.json")
