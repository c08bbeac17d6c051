"""The corpus that training is measured on: texts fill packs to the token, photos have the sizes that are promised."""

from io import BytesIO

import pytest
from PIL import Image

from nemo_bluelm.bench.corpus import make_corpus
from nemo_bluelm.bench.images import SIZES
from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.data.records import read_records
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.train.packs import open_packs

TINY = ["model=tiny", "precision=fp32", "data.sequence_length=256", "data.decode.threads=0"]


def records(folder, pattern):
    shards = sorted(folder.glob(pattern))
    return [entry for shard in shards for entry in read_records(shard)]


@pytest.mark.parametrize("length", [64, 256])
def test_texts_have_exactly_the_tokens_of_a_pack(bench_corpus, length):
    folder, told = bench_corpus
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    texts = records(folder, f"text-{length}-*.tar")
    assert len(texts) == told["samples"][f"text-{length}"] == 4096 // length
    assert {len(record.encode(tokenizer, []).tokens) for _, record, _ in texts} == {length}
    assert len({record.text for _, record, _ in texts}) == len(texts)
    filler = sum(record.text.count(" the the") for _, record, _ in texts)
    assert filler < len(texts)  # text, not what fills it up


def test_photos_come_in_all_sizes(bench_corpus):
    folder, _ = bench_corpus
    images = [data for _, _, found in records(folder, "images-*.tar") for data in found]
    assert {Image.open(BytesIO(data)).size for data in images} == set(SIZES)


def test_same_every_time(bench_corpus, tmp_path):
    folder, told = bench_corpus
    again = make_corpus(tmp_path / "again", lengths=[256, 64], text_tokens=4096, images=4, vocab_size=512)
    assert again == told
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_refuses_a_folder_in_use(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        make_corpus(tmp_path)


def test_text_packs_are_single_documents(bench_corpus, tmp_path):
    folder, _ = bench_corpus
    recipe = load_recipe("bench/text_4k", [*TINY, f"data.root={folder}", f"data.index={tmp_path}"])
    loader = open_packs(recipe)
    for _ in range(40):  # more than the corpus holds
        batch = loader.load(next(loader.plan)).batch
        assert batch.cu_seqlens.tolist() == [0, 256]


def test_mixed_packs_hold_images_and_text_60_to_40(bench_corpus, tmp_path):
    folder, _ = bench_corpus
    recipe = load_recipe("bench/mixed", [*TINY, f"data.root={folder}", f"data.index={tmp_path}"])
    loader = open_packs(recipe)
    packs = [next(loader.plan) for _ in range(200)]
    tokens = loader.plan.tokens()
    assert tokens["images"] / sum(tokens.values()) == pytest.approx(0.6, abs=0.02)
    assert any(pack.tiles for pack in packs) and any(len(pack.pieces) > 1 for pack in packs)
