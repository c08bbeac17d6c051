"""A small corpus of the kind that training is measured on."""

import pytest


@pytest.fixture(scope="session")
def bench_corpus(tmp_path_factory):
    from nemo_bluelm.bench.corpus import make_corpus

    folder = tmp_path_factory.mktemp("bench") / "corpus"
    return folder, make_corpus(folder, lengths=[64, 256], text_tokens=4096, images=4, vocab_size=512)
