"""``data view``, ``data inspect`` and ``data stats``: what they write and print, and how they refuse."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.conftest import one_line


@pytest.fixture
def data(corpus, tmp_path) -> list[str]:
    """Overrides that make a packaged recipe read the corpus."""
    return [f"data.root={corpus}", f"data.index={tmp_path / 'index'}"]


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (112, 168, 3), dtype=np.uint8)).save(path)
    return path


def test_view_draws_and_counts(cli, photo, tmp_path):
    out = tmp_path / "seen.png"
    code, printed, _ = cli("data", "view", str(photo), "--out", str(out), "--model", "tiny", "--json")
    facts = json.loads(printed)
    assert code == 0
    assert (facts["grid"], facts["tiles"], facts["tokens"]) == ([3, 2], 7, 28)
    assert (facts["model"], facts["backend"], facts["out"]) == ("tiny", "torch", str(out))
    with Image.open(out) as picture:
        assert picture.format == "PNG" and min(picture.size) > 400


def test_view_names_its_picture_after_the_image(cli, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed, _ = cli("data", "view", str(photo), "--model", "tiny", "--backend", "pil")
    assert code == 0 and (tmp_path / "photo_anyres.png").is_file()
    assert "photo_anyres.png: 168 x 112 px, grid 3 x 2 (columns x rows), 7 tiles, 28 tokens" in printed


@pytest.mark.parametrize("content", [b"", b"hello", "cut"])
def test_view_of_a_bad_image_writes_nothing(cli, photo, tmp_path, content):
    bad = tmp_path / "bad.png"
    bad.write_bytes(photo.read_bytes()[:5000] if content == "cut" else content)
    before = sorted(tmp_path.iterdir())
    code, _, stderr = cli("data", "view", str(bad), "--out", str(tmp_path / "out.png"), "--model", "tiny")
    assert one_line(code, stderr).startswith("bad.png: ")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["none.png"], "none.png can't be read"),
        (["{photo}", "--model", "tinny"], "did you mean tiny"),
        (["{photo}", "--backend", "toch"], "did you mean torch"),
        (["{photo}", "--out", "x.jpg"], "x.png"),
        (["{photo}", "--out", "{folder}/no/x.png"], "can't be written"),
    ],
)
def test_view_refuses(cli, photo, tmp_path, arguments, says):
    arguments = [word.format(photo=photo, folder=tmp_path) for word in arguments]
    code, _, stderr = cli("data", "view", *arguments)
    assert says in one_line(code, stderr)


def test_inspect_writes_the_pack_that_training_reads(cli, data, tmp_path):
    from nemo_bluelm.cli.recipe_data import open_recipe_data

    out = tmp_path / "pack.html"
    code, printed, _ = cli("data", "inspect", "tiny/sft", "2", *data, "--out", str(out))
    assert code == 0
    loader = open_recipe_data("tiny/sft", data, pixels=True)
    pack = [loader.load(next(loader.plan)) for _ in range(3)][2]
    assert f"pack 2, {len(pack.documents)} documents" in printed
    assert f"{pack.batch.num_tokens:,} targets, {len(pack.batch.tiles)} tiles, 0 bad samples" in printed
    page = out.read_text(encoding="utf-8")
    assert "<h1>Pack 2</h1>" in page
    shown = re.findall(r'<span class="name">([^<]*)</span>', page)
    assert shown == [document.sample.key for document in pack.documents]
    assert page.count('src="data:image/png;base64,') == len(pack.batch.tiles)


def test_inspect_shows_a_sample_that_does_not_decode_as_a_hole(cli, corpus, tmp_path):
    """Four photos, of which one is cut short behind its header."""
    from nemo_bluelm.data.writer import RawSample, question_record, write_shard

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)).save(file, "PNG")
    whole = file.getvalue()
    (tmp_path / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    record = question_record("What?", "<script>", None, "0.png", ["t"])
    write_shard(
        tmp_path / "text-0.tar",
        [RawSample(f"s{n}", record, {"0.png": whole[:2000] if n == 2 else whole}) for n in range(4)],
    )
    out = tmp_path / "pack.html"
    sources = [f"~data.sources.{name}" for name in ("digits", "photos", "text", "prose", "needle")]
    sources += ["+data.sources={mine: {shards: [text-0.tar], max_epochs: 1}}"]
    where = [f"data.root={tmp_path}", f"data.index={tmp_path / 'index'}", f"--out={out}"]
    code, printed, stderr = cli("data", "inspect", "tiny/sft", "0", *sources, *where)
    assert code == 0, stderr
    assert "4 documents" in printed and "3 tiles, 1 bad samples" in printed
    page = out.read_text(encoding="utf-8")
    assert page.count("left as a hole") == 1 and page.count('src="data:image/png;base64,') == 3
    code, _, stderr = cli("data", "inspect", "tiny/sft", "9", *sources, *where)
    assert "the sources end after 1 packs" in one_line(code, stderr)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["inspect", "tiny/sft", "-1"], "not the number of a pack"),
        (["inspect", "tiny/sft", "two"], "not the number of a pack"),
        (["inspect", "tiny/sft", "9" * 20], "is more than any run reads"),
        (["inspect", "tiny/sft", "9" * 5000], "is more than any run reads"),
        (["inspect", "tiny/sft"], "PACK"),
        (["inspect", "tiny/sft", "0", "--out", "no/such/folder/x.html"], "does not exist"),
        (["inspect", "tiny/sft", "0", "data.root=no-such"], "no-such"),
        (["stats", "tiny/sft", "data.root=no-such"], "no-such"),
        (["stats", "sft"], "data.root"),
        (["stats", "tiny/sft", "--packs", "0"], "1 or more"),
    ],
)
def test_inspect_and_stats_refuse(cli, arguments, says):
    code, _, stderr = cli("data", *arguments)
    assert says in one_line(code, stderr)


def test_stats_prints_the_mixture_in_80_columns(cli, data):
    code, printed, _ = cli("data", "stats", "tiny/sft", *data, "--packs", "50")
    assert code == 0
    assert max(map(len, printed.splitlines())) <= 80
    for expected in ("digits", "photos", "text records", "40.00%", "sequence fill", "samples/s", "in quarantine"):
        assert expected in printed


def test_stats_for_programs(cli, data):
    code, printed, _ = cli("data", "stats", "tiny/sft", *data, "--packs", "50", "--json")
    stats = json.loads(printed)
    assert code == 0
    assert stats["packs"] == 50 and stats["fill"]["capacity"] == 50 * 512
    assert sorted(stats["sources"]) == ["digits", "needle", "photos", "prose", "text"]
    assert sum(source["delivered"]["tokens"] for source in stats["sources"].values()) == stats["fill"]["tokens"]


def test_stats_needs_no_decoder(cli, data):
    """DALI on a GPU is what the recipe asks for; counting works without."""
    decode = ["data.decode.backend=dali", "data.decode.device=gpu"]
    code, printed, stderr = cli("data", "stats", "tiny/sft", *data, *decode, "--packs", "3", "--json")
    assert code == 0, stderr
    assert json.loads(printed)["packs"] == 3
