"""The index: counts that the stream keeps, pieces of long texts, and one line for everything that is wrong."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from data_pieces import GEOMETRY, image_sample, png

from nemo_bluelm.config.schema import SourceConfig
from nemo_bluelm.data.index import build_index
from nemo_bluelm.data.records import Record, read_records
from nemo_bluelm.data.shards import ShardReader, scan_shard
from nemo_bluelm.data.writer import RawSample, question_record, write_shard
from nemo_bluelm.errors import UserError


def test_counts(small, tokenizer):
    index = build_index(small, tokenizer, GEOMETRY)
    assert list(index) == ["images", "text"]
    assert [len(samples) for samples in index.values()] == [5, 7]
    wide = index["images"][4]
    assert (wide.shard, wide.key, wide.images[0].width, wide.images[0].height) == ("images-0.tar", "i4", 248, 8)
    assert wide.tiles == GEOMETRY.tiles(248, 8) > 1
    assert wide.tokens - index["images"][0].tokens == (wide.tiles - 1) * 4


def test_members_are_read_by_offset(small):
    root = Path(small.root)
    members = scan_shard(root / "images-0.tar")["i3"]
    assert ShardReader(root).read("images-0.tar", members["0.png"]) == png(188, 8)
    key, record, images = list(read_records(root / "images-0.tar"))[3]
    assert (key, images) == ("i3", [png(188, 8)]) and isinstance(record, Record)


def test_long_text_is_split_without_loss(small, tokenizer):
    text = " ".join(f"word{n}" for n in range(400))
    write_shard(Path(small.root) / "text-0.tar", [RawSample("long", {"text": text})])
    pieces = build_index(small, tokenizer, GEOMETRY)["text"]
    whole = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
    assert len(pieces) > 5 and max(piece.tokens for piece in pieces) == 128
    targets = [i for piece in pieces for i in range(piece.start + 1, piece.start + piece.tokens)]
    assert targets == list(range(1, len(whole)))


def test_absolute_patterns_and_doubles(small, tokenizer):
    root = small.root
    small.sources["text"] = SourceConfig(["text-*.tar", "text-0.tar", f"{root}/*-0.tar"], 1.0)
    assert len(build_index(small, tokenizer, GEOMETRY)["text"]) == 12


def sample(record, images=None, key="k"):
    return lambda path: write_shard(path, [RawSample(key, record, images or {})])


def raw(**members):
    def write(path):
        with tarfile.open(path, "w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name.replace("__", "."))
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    return write


def cut(keep):
    def write(path):
        write_shard(path, [image_sample(f"k{n}", 200, 200) for n in range(3)])
        data = path.read_bytes()
        path.write_bytes(data[: keep(path, data)])

    return write


def between_members(path, data):
    member = scan_shard(path)["k1"]["json"]
    return member.offset - tarfile.BLOCKSIZE


def compressed(path):
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("k.json")
        tar.addfile(info, io.BytesIO(b""))


TALK = question_record("What?", "7", None, "0.png", [])
LONG = question_record("What? " * 200, "7", None, "0.png", [])
BAD = {
    "not-a-tar": (lambda path: path.write_bytes(b"hello" * 400), "not a whole uncompressed tar"),
    "empty-file": (lambda path: path.write_bytes(b""), "not a whole uncompressed tar"),
    "compressed": (compressed, "not a whole uncompressed tar"),
    "cut-in-member": (cut(lambda path, data: len(data) // 2), "not a whole uncompressed tar"),
    "cut-between": (cut(between_members), "truncated"),
    "no-samples": (lambda path: write_shard(path, []), "data.sources.images has no samples"),
    "no-json": (raw(k__0__png=png(8, 8)), "has no member k.json"),
    "json": (raw(k__json=b"{'a'"), "sample 'k': the JSON is invalid"),
    "json-bytes": (raw(k__json=b'{"text": "\xff"}'), "sample 'k': the JSON is invalid"),
    "json-list": (sample([]), "must be an object"),
    "neither": (sample({"tags": []}), "either messages or text"),
    "both": (sample({"text": "a", "messages": []}), "either messages or text"),
    "unknown-key": (sample({"text": "a", "txet": "b"}), "unknown key 'txet'"),
    "empty-text": (sample({"text": ""}), "text is ''"),
    "images-type": (sample(TALK | {"images": "0.png"}), "must be a list of strings"),
    "role": (sample({"messages": [{"role": "bot", "content": "x"}]}), "sample 'k': messages[0].role is 'bot'"),
    "image-missing": (sample(TALK), "has no member k.0.png"),
    "image-left-over": (sample(TALK, {"0.png": png(8, 8), "1.png": png(8, 8)}), "k.1.png that its images don't name"),
    "image-count": (sample(TALK | {"images": ["0.png"] * 2}, {"0.png": png(8, 8)}), "1 image parts but 2 images"),
    "not-an-image": (sample(TALK, {"0.png": b"<html>"}), "image k.0.png is not an image"),
    "no-extension": (raw(k=b"{}"), "not named KEY.EXTENSION"),
    "too-long": (sample(LONG, {"0.png": png(8, 8)}), "tokens, more than data.sequence_length 128"),
    "too-many-tiles": (
        sample(
            {"messages": [{"role": "user", "content": [{"type": "image"}] * 2}, {"role": "assistant", "content": "x"}]}
            | {"images": ["0.png", "1.png"]},
            {"0.png": png(224, 224), "1.png": png(224, 224)},
        ),
        "34 tiles, more than data.max_tiles 20",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_shard_is_one_line_that_names_it(case, small, tokenizer):
    write, words = BAD[case]
    write(Path(small.root) / "images-0.tar")
    with pytest.raises(UserError) as error:
        build_index(small, tokenizer, GEOMETRY)
    message = str(error.value)
    assert words in message and "\n" not in message
    assert "images-0.tar" in message or case == "no-samples"


def test_member_twice(small, tokenizer):
    with tarfile.open(Path(small.root) / "text-0.tar", "w") as tar:
        for _ in range(2):
            data = json.dumps({"text": "a"}).encode()
            info = tarfile.TarInfo("k.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(UserError, match="text-0.tar: member 'k.json' is there twice"):
        build_index(small, tokenizer, GEOMETRY)


def test_config_errors(small, tokenizer):
    def message():
        with pytest.raises(UserError) as error:
            build_index(small, tokenizer, GEOMETRY)
        return str(error.value)

    small.sources["text"].shards = ["txet-*.tar"]
    assert "data.sources.text.shards: 'txet-*.tar' matches no file" in message() and small.root in message()
    small.sources["text"].shards = []
    assert "data.sources.text.shards is empty" in message()
    small.sources = {}
    assert "data.sources is empty" in message()
    small.root += "/nowhere"
    assert "data.root" in message() and "nowhere is not a folder" in message()
