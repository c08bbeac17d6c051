"""Shared pieces: the corpus, a tokenizer, and small shards."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from nemo_bluelm.config.schema import DataConfig, SourceConfig
from nemo_bluelm.data.corpus import make_corpus
from nemo_bluelm.data.index import build_index
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.data.writer import RawSample, write_shard

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "oracles"), str(TESTS / "data")]  # also under pytest's importlib mode

from data_pieces import GEOMETRY, image_sample  # noqa: E402


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "corpus"
    make_corpus(out)
    return out


@pytest.fixture(scope="session")
def tokenizer(corpus) -> Tokenizer:
    return Tokenizer.load(corpus / "tokenizer.json")


@pytest.fixture
def data(corpus, tmp_path) -> DataConfig:
    """The corpus as a mixture of 60 : 20 : 20."""
    sources = {
        "digits": SourceConfig(["digits-train-*.tar"], 0.6),
        "photos": SourceConfig(["photos-train-*.tar"], 0.2),
        "text": SourceConfig(["text-train-*.tar"], 0.2),
    }
    return DataConfig(str(corpus), index=str(tmp_path / "index"), sequence_length=512, max_tiles=64, sources=sources)


@pytest.fixture
def small(tmp_path, tokenizer, corpus) -> DataConfig:
    """Two sources of a few samples in a folder of their own, to be broken."""
    (tmp_path / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    write_shard(tmp_path / "images-0.tar", [image_sample(f"i{n}", 8 + 60 * n, 8) for n in range(5)])
    write_shard(tmp_path / "text-0.tar", [RawSample(f"t{n}", {"text": "word " * (9 + n)}) for n in range(7)])
    sources = {"images": SourceConfig(["images-*.tar"], 1.0), "text": SourceConfig(["text-*.tar"], 1.0)}
    index = str(tmp_path / "index")
    return DataConfig(root=str(tmp_path), index=index, sequence_length=128, max_tiles=20, sources=sources)


@pytest.fixture
def public_folder():
    """A folder that other users can enter, which pytest's own are not. Only root can become another user."""
    if os.getuid():
        pytest.skip("only root can become another user")
    folder = Path(tempfile.mkdtemp(prefix="nemo-bluelm-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def root(tmp_path, corpus):
    """A folder of two small shards, five images and seven texts, and the tokenizer."""
    folder = tmp_path / "root"
    folder.mkdir()
    shutil.copy(corpus / "tokenizer.json", folder)
    write_shard(folder / "images-0.tar", [image_sample(f"i{n}", 8 + 60 * n, 8) for n in range(5)])
    write_shard(folder / "text-0.tar", [RawSample(f"t{n}", {"text": "word " * (9 + n)}) for n in range(7)])
    return folder


@pytest.fixture
def build(root, tmp_path, tokenizer):
    """``build("*.tar", ...)``: the index of shards in ``root``."""

    def build(*shards, out="index", geometry=GEOMETRY, tokenizer=tokenizer, root=root, **options):
        return build_index(shards or ["*.tar"], tmp_path / out, geometry, tokenizer, root=root, **options)

    return build
