"""The index: rows that the loader can trust, work done once, bad samples that stop nothing."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import fsspec
import pytest
from data_pieces import GEOMETRY, image_sample, png
from range_server import serve

from nemo_bluelm.data import files as files_module
from nemo_bluelm.data.ledger import Entry
from nemo_bluelm.data.records import Record, read_records
from nemo_bluelm.data.shards import Files, Member
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.data.writer import RawSample, question_record, write_shard
from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry

CHECKOUT = Path(__file__).parents[2]
TALK = question_record("What?", "7", None, "0.png", [])
IMAGE = {"type": "image"}


def words(text):
    return {"type": "text", "text": text}


def test_rows(build, tokenizer):
    index = build()
    assert list(index) == ["images-0.tar", "text-0.tar"]
    images, text = index.values()
    assert (len(images), len(text), images.num_images, text.num_images) == (5, 7, 5, 0)
    assert images.tokens.dtype == images.tiles.dtype == images.least.dtype == "int32"
    assert images.text.dtype == "bool" and images.offsets.dtype == "int64"
    assert not images.text.any() and text.text.all() and text.least.tolist() == [2] * 7
    wide = images.sample(4)
    assert (wide.shard, wide.key, wide.where) == ("images-0.tar", "i4", "images-0.tar: sample 'i4'")
    assert (wide.images[0].name, wide.images[0].width, wide.images[0].height) == ("0.png", 248, 8)
    assert wide.tiles == GEOMETRY.tiles(248, 8) == images.tiles[4]
    assert wide.tokens - images.tokens[0] == (wide.tiles - images.tiles[0]) * GEOMETRY.tokens_per_tile
    assert wide.offset == images.offsets[4] == wide.json.offset - tarfile.BLOCKSIZE
    encoded = Record.parse(b'{"text": "' + b"word " * 9 + b'"}').encode(tokenizer, [])
    assert text.sample(0).tokens == len(encoded.tokens) and images.num_tokens == images.tokens.sum()
    with pytest.raises(IndexError):
        images.sample(5)


def test_bytes_are_found_by_what_a_sample_says(build, root):
    sample = build()["images-0.tar"].sample(3)
    files = Files(root)
    record = files.read(sample.shard, *sample.json)
    assert json.loads(record)["images"] == ["0.png"]
    assert hashlib.sha256(record).digest()[:16] == sample.digest
    assert files.read(sample.images[0].file, *sample.images[0].member) == png(188, 8)
    key, _, images = list(read_records(root / "images-0.tar"))[3]
    assert (key, images) == ("i3", [png(188, 8)])


def test_least_tokens_hold_all_images_and_a_target(build, root, tokenizer):
    turns = [
        {"role": "user", "content": [IMAGE, words("What?")]},
        {"role": "assistant", "content": "a cat, " * 20},
        {"role": "user", "content": [words("And "), IMAGE, words(" this? " * 20)]},
        {"role": "assistant", "content": "a dog, " * 20},
    ]
    one = question_record("What? " * 20, "7", "One loop.", "0.png", [])
    document = {"document": [words("one " * 9), IMAGE, words("two " * 9), IMAGE], "images": ["0.png", "0.png"]}
    records = [{"messages": turns, "images": ["0.png", "0.png"]}, one, document, {"document": [words("word " * 20)]}]
    picture = {"0.png": png(8, 8)}
    samples = [RawSample(f"k{n}", r, picture if r.get("images") else {}) for n, r in enumerate(records)]
    write_shard(root / "least.tar", samples)
    shard = build("least.tar")["least.tar"]
    assert len(shard) == 4 and shard.text.tolist() == [False, False, False, True]
    for row, record in enumerate(records):
        encoded = Record.parse(json.dumps(record).encode()).encode(tokenizer, [4] * len(record.get("images", [])))

        def enough(length, encoded=encoded):
            complete = encoded.tokens[:length].count(tokenizer.im_end) == encoded.images
            return complete and any(encoded.loss_mask[:length])

        assert shard.least[row] == next(n for n in range(len(encoded.tokens) + 1) if enough(n))


def test_interleaved_documents(build, root, tokenizer):
    parts = [words("Before "), IMAGE, words(" between "), IMAGE, words(" after.")]
    record = {"document": parts, "images": ["b.png", "a.jpg.png"], "tags": ["web"], "id": 7}
    write_shard(root / "docs.tar", [RawSample("k", record, {"a.jpg.png": png(8, 8), "b.png": png(248, 8)})])
    sample = build("docs.tar")["docs.tar"].sample(0)
    assert (sample.key, sample.tags, sample.text) == ("7", ("web",), False)
    assert [(image.name, image.width) for image in sample.images] == [("b.png", 248), ("a.jpg.png", 8)]
    counts = [GEOMETRY.image_tokens(image.width, image.height) for image in sample.images]
    encoded = Record.parse(json.dumps(record).encode()).encode(tokenizer, counts)
    assert len(encoded.tokens) == sample.tokens
    pictures = ["<im_start>" + "<image>" * count + "<im_end>" for count in counts]
    assert tokenizer.decode(encoded.tokens) == f"<s>Before {pictures[0]} between {pictures[1]} after.</s>"
    targets = [token for token, target in zip(encoded.tokens, encoded.loss_mask) if target]
    assert tokenizer.decode(targets) == "Before  between  after.</s>"


def test_tags(build, root):
    tags = [["a"], [], ["b", "a"], ["b", "b"]]
    write_shard(root / "tags.tar", [RawSample(f"k{n}", {"text": "x", "tags": tag}) for n, tag in enumerate(tags)])
    shard = build("tags.tar")["tags.tar"]
    assert shard.tags == {"a", "b"}
    assert shard.rows_with_tag("a").tolist() == [0, 2] and shard.rows_with_tag("b").tolist() == [2, 3]
    assert shard.rows_with_tag("c").tolist() == []


def test_rows_beyond_one_batch(build, root):
    write_shard(root / "many.tar", [RawSample(f"k{n}", {"text": "x", "tags": [str(n % 3)]}) for n in range(4096 + 9)])
    shard = build("many.tar")["many.tar"]
    assert [shard.sample(row).key for row in (0, 4095, 4096, 4104)] == ["k0", "k4095", "k4096", "k4104"]
    assert len(shard.tokens) == len(shard) == 4105 and (shard.offsets[1:] > shard.offsets[:-1]).all()
    assert shard.rows_with_tag("2").tolist() == list(range(2, 4105, 3))


def jsonl(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_jsonl_with_loose_images(build, root):
    (root / "sub" / "pictures").mkdir(parents=True)
    (root / "sub" / "pictures" / "a b.png").write_bytes(png(248, 8))
    good = TALK | {"images": ["pictures/a b.png"]}
    jsonl(root / "sub" / "s.jsonl", good, {"text": "word", "id": "mine"}, {"text": ""}, good | {"tags": ["x"]})
    index = build("sub/*.jsonl")
    shard = index["sub/s.jsonl"]
    assert [shard.sample(row).key for row in range(3)] == ["1", "mine", "4"] and shard.rejected == 1
    image = shard.sample(2).images[0]
    assert (image.file, image.member) == ("sub/pictures/a b.png", Member(0, len(png(248, 8))))
    assert Files(root).read(image.file, *image.member) == png(248, 8)
    assert json.loads(Files(root).read("sub/s.jsonl", *shard.sample(2).json)) == good | {"tags": ["x"]}
    (row,) = index.ledger.entries()
    assert (os.path.relpath(row.shard, root), row.key, row.stage) == (
        "sub/s.jsonl",
        "3",
        "index",
    ) and "text is ''" in row.error
    (root / "sub" / "s.jsonl").write_text(json.dumps(good) + "\n")
    assert [(key, images) for key, _, images in read_records(root / "sub/s.jsonl")] == [("1", [png(248, 8)])]


@pytest.mark.parametrize("place", ["../s.png", "/etc/s.png", "a/../../s.png", "", ".", "http://host/s.png"])
def test_an_image_outside_the_folder_of_its_jsonl_is_refused(place, build, root):
    (root / "s.png").write_bytes(png(8, 8))
    jsonl(root / "sub" / "s.jsonl", TALK | {"images": [place]}, {"text": "word"})
    index = build("sub/s.jsonl")
    assert len(index["sub/s.jsonl"]) == 1
    assert "is no path below the folder of the JSONL" in index.ledger.entries()[0].error


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("a\0.png", "no file has such a name"),
        ("n" * 300 + ".png", "File name too long"),
        ("loop.png", "Too many levels of symbolic links"),
        ("s.jsonl/a.png", "Not a directory"),
        ("sub", "it is not a file"),
    ],
    ids=["nul", "long", "loop", "file-as-folder", "folder"],
)
def test_an_image_that_no_file_can_be_costs_its_sample_alone(place, reason, build, root):
    (root / "loop.png").symlink_to("loop.png")
    (root / "sub").mkdir()
    jsonl(root / "s.jsonl", {"text": "a"}, TALK | {"images": [place]}, {"text": "b"})
    index = build("s.jsonl")
    shard = index["s.jsonl"]
    assert [shard.sample(row).key for row in range(len(shard))] == ["1", "3"]
    assert (shard.rejected, shard.torn) == (1, None)
    (row,) = index.ledger.entries()
    assert row.key == "2" and reason in row.error


def raw(*members):
    def write(path):
        with tarfile.open(path, "w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    return write


def sample(record, images=None):
    return lambda path: write_shard(path, [RawSample("k", record, images or {})])


BAD = {
    "no-json": (raw(("k.0.png", png(8, 8))), "has no member k.json"),
    "json": (raw(("k.json", b"{'a'")), "the JSON is invalid"),
    "json-bytes": (raw(("k.json", b'{"text": "\xff"}')), "the JSON is invalid"),
    "json-deep": (raw(("k.json", b"[" * 100_000)), "the JSON is invalid"),
    "json-list": (sample([]), "must be an object"),
    "neither": (sample({"tags": []}), "must have one of messages, document, text"),
    "both": (sample({"text": "a", "messages": []}), "must have one of messages, document, text"),
    "unknown-key": (sample({"text": "a", "txet": "b"}), "unknown key 'txet'"),
    "images-of-text": (sample({"text": "a", "images": []}), "unknown key 'images'"),
    "empty-text": (sample({"text": ""}), "text is ''"),
    "control-token": (sample({"text": "[|Human|]:Why?[|BlueThink|]\n[|AI|]:So."}), "spells out [|BlueThink|]"),
    "control-token-in-a-query": (sample({"messages": [{"role": "user", "content": "[|BlueThink|]Why?"}]}), "remove it"),
    "surrogate": (raw(("k.json", b'{"text": "\\ud800"}')), "not valid Unicode"),
    "surrogate-tag": (raw(("k.json", b'{"text": "a", "tags": ["\\ud800"]}')), "tags is"),
    "images-type": (sample(TALK | {"images": "0.png"}), "must be a list of strings"),
    "id-type": (sample({"text": "a", "id": [1]}), "id is [1]"),
    "role": (sample({"messages": [{"role": "bot", "content": "x"}]}), "messages[0].role is 'bot'"),
    "document-text": (sample({"document": "word"}), "document is 'word'"),
    "document-empty": (sample({"document": []}), "content of a document is []"),
    "document-part": (sample({"document": [{"type": "video"}]}), "a content part of a document is"),
    "document-images": (sample({"document": [IMAGE]}), "1 image parts but 0 images"),
    "image-missing": (sample(TALK), "has no member k.0.png"),
    "image-left-over": (sample(TALK, {"0.png": png(8, 8), "1.png": b""}), "k.1.png that its images don't name"),
    "image-count": (sample(TALK | {"images": ["0.png"] * 2}, {"0.png": png(8, 8)}), "1 image parts but 2 images"),
    "not-an-image": (sample(TALK, {"0.png": b"<html>"}), "image 0.png: not an image"),
    "one-pixel": (sample(TALK, {"0.png": png(1, 1)}), "image 0.png: 1 x 1 pixels"),
    "no-extension": (raw(("k", b"{}")), "not named KEY.EXTENSION"),
    "member-twice": (raw(("k.json", b"{}"), ("k.json", b"{}")), "k.json is there twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sample_is_a_row_in_the_ledger(case, build, root):
    write, reason = BAD[case]
    write(root / "images-0.tar")
    index = build()
    shard = index["images-0.tar"]
    assert (len(shard), shard.rejected, shard.torn) == (0, 1, None) and len(index["text-0.tar"]) == 7
    (row,) = index.ledger.entries()
    assert (os.path.relpath(row.shard, root), row.key, row.offset, row.stage) == ("images-0.tar", "k", 0, "index")
    assert reason in row.error and "\n" not in row.error
    (root / "images-0.tar").touch()
    assert len(build().ledger.entries()) == 1


def test_good_neighbours_of_bad_samples(build, root):
    samples = [image_sample(f"k{n}") for n in range(6)]
    samples[0] = RawSample("k0", TALK, {"0.png": b""})
    samples[3] = RawSample("k3", TALK)
    samples[5] = RawSample("k5", {"text": 5})
    write_shard(root / "images-0.tar", samples)
    index = build("images-0.tar")
    shard = index["images-0.tar"]
    assert [shard.sample(row).key for row in range(len(shard))] == ["k1", "k2", "k4"] and shard.rejected == 3
    assert [(row.key, bool(row.sha1)) for row in index.ledger.entries()] == [("k0", True), ("k3", True), ("k5", False)]


def test_a_torn_shard_keeps_its_whole_samples(build, root):
    path = root / "text-0.tar"
    path.write_bytes(path.read_bytes()[:4000])  # the header of the fourth is whole, its JSON is not
    index = build()
    shard = index["text-0.tar"]
    assert (len(shard), shard.rejected) == (3, 0) and "write the shard again" in shard.torn
    (row,) = index.ledger.entries()
    assert (os.path.relpath(row.shard, root), row.key, row.offset) == (
        "text-0.tar",
        "",
        3072,
    ) and "the shard is torn" in row.error
    again = build()["text-0.tar"]
    assert (again.torn, len(again)) == (shard.torn, 3)


def test_a_shard_that_cannot_be_read_is_tried_again(build, root, monkeypatch):
    pread = os.pread

    def fails(fd, size, offset):
        if os.readlink(f"/proc/self/fd/{fd}").endswith("text-0.tar"):
            raise OSError(5, "Input/output error")
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", fails)
    index = build("text-0.tar")
    assert len(index["text-0.tar"]) == 0 and "Input/output error" in index["text-0.tar"].torn
    (row,) = index.ledger.entries()
    assert (os.path.relpath(row.shard, root), row.key) == (
        "text-0.tar",
        "",
    ) and "text-0.tar can't be read: Input/output" in row.error
    monkeypatch.setattr(os, "pread", pread)
    assert len(build("text-0.tar")["text-0.tar"]) == 7


def written(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}


def test_unchanged_shards_are_not_read_again(build, root, tmp_path, monkeypatch):
    first = build()
    before = written(tmp_path / "index")
    with monkeypatch.context() as patch:
        patch.setattr(Files, "open", lambda *_: pytest.fail("a shard was opened"))
        second = build()
    assert written(tmp_path / "index") == before and {s.digest for s in second.values()} == {
        s.digest for s in first.values()
    }
    write_shard(root / "text-0.tar", [RawSample("new", {"text": "word"})])
    third = build()
    changed = set(written(tmp_path / "index")) - set(before)
    assert len(changed) == 1 and changed.pop().startswith("text-0-")
    assert [len(shard) for shard in third.values()] == [5, 1]
    assert first["text-0.tar"].tokens.tolist() == second["text-0.tar"].tokens.tolist()  # a run that still reads it
    assert first["text-0.tar"].sample(6).key == "t6" and len(written(tmp_path / "index")) == 3


def test_other_settings_live_beside_each_other(build, root, tmp_path, tokenizer):
    build()
    other = build(geometry=Geometry(tile=28))
    assert other["images-0.tar"].tokens.tolist() != build()["images-0.tar"].tokens.tolist()
    file = json.loads((root / "tokenizer.json").read_text())
    (root / "tokenizer.json").write_text(json.dumps(file))
    build(tokenizer=Tokenizer.load(root / "tokenizer.json"))  # other bytes, perhaps another meaning
    assert len(written(tmp_path / "index")) == 6


def test_the_digest_is_free_of_the_place(build, root, tmp_path):
    jsonl(root / "sub" / "s.jsonl", {"text": "word"})
    digests = {name: shard.digest for name, shard in build("**/*.tar", "sub/s.jsonl").items()}
    shutil.move(root, tmp_path / "moved")
    moved = build("**/*.tar", "sub/s.jsonl", root=tmp_path / "moved", out="index-of-moved")
    assert {name: shard.digest for name, shard in moved.items()} == digests
    assert moved["text-0.tar"].sample(0).shard == "text-0.tar"
    assert len(set(digests.values())) == 3


def test_damaged_index_files_are_made_again(build, tmp_path):
    digests = [shard.digest for shard in build().values()]
    first, second = sorted((tmp_path / "index").glob("*.arrow"))
    first.write_bytes(first.read_bytes()[:-100])
    (tmp_path / "index" / "images-0.arrow.4242.partial").write_bytes(b"left by a process that was killed")
    second.unlink()
    for sidecar in (tmp_path / "index").glob("text*.json"):
        sidecar.write_text('{"stat": ')
    index = build()
    assert [shard.digest for shard in index.values()] == digests
    assert index["images-0.tar"].sample(0).key == "i0" and not list((tmp_path / "index").glob("*.partial"))


def test_quarantine_is_left_out_once_applied(build):
    index = build()
    sample = index["text-0.tar"].sample(2)
    entry = Entry(str(Path(index.root) / sample.shard), sample.key, sample.offset, "", "broken", "read")
    assert index.ledger.append(entry) and build().excluded == {}
    assert build().ledger.apply() == 1
    excluded = build().excluded
    assert list(excluded) == ["text-0.tar"] and excluded["text-0.tar"].tolist() == [2]
    assert excluded["text-0.tar"].dtype == "int64" and len(build()["text-0.tar"]) == 7
    assert build().ledger.clear() == 1 and build().excluded == {}


def test_remote_shards(build, root, monkeypatch):
    monkeypatch.setattr(files_module.time, "sleep", lambda seconds: None)
    (root / "pictures").mkdir()
    (root / "pictures" / "a.png").write_bytes(png(248, 8))
    jsonl(root / "s.jsonl", TALK | {"images": ["pictures/a.png"]}, TALK | {"images": ["pictures/b.png"]})
    names = ["images-0.tar", "s.jsonl", "text-0.tar"]
    local = {name: shard.digest for name, shard in build(*names).items()}
    store = fsspec.filesystem("memory")
    for path in root.rglob("*"):
        if path.is_file():
            store.pipe(f"/bucket/{path.relative_to(root)}", path.read_bytes())
    index = build("*.tar", "*.jsonl", root="memory://bucket", out="memory")
    assert {name: shard.digest for name, shard in index.items()} == local
    image = index["s.jsonl"].sample(0).images[0]
    assert Files(index.root).read(image.file, *image.member) == png(248, 8)
    with serve(root) as server:
        index = build(*names, root=server.url, out="web")
        assert {name: shard.digest for name, shard in index.items()} == local
        asked = len(server.requests)
        build(*names, root=server.url, out="web")
        assert not [wanted for _, wanted in server.requests[asked:] if wanted]
        mixed = build(f"{server.url}/text-0.tar", "images-0.tar", out="mixed")
        assert list(mixed) == [f"{server.url}/text-0.tar", "images-0.tar"]
        assert mixed[f"{server.url}/text-0.tar"].digest == local["text-0.tar"]
        server.failures = 10**6
        (root / "text-0.tar").write_bytes((root / "text-0.tar").read_bytes() + bytes(512))
        broken = build(*names, root=server.url, out="web")["text-0.tar"]
        assert len(broken) == 0 and "tried 3 times" in broken.torn
        server.failures = 0
        assert len(build(*names, root=server.url, out="web")["text-0.tar"]) == 7


def test_mistakes_are_one_line(build, root, tmp_path):
    with pytest.raises(UserError, match="'txet-\\*.tar' matches no file"):
        build("txet-*.tar")
    with pytest.raises(UserError, match="nowhere is not a folder"):
        build(root=tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="index .*file can't be written"):
        build(out="file")
