"""The stream: determinism, random access, tokens and tiles that agree, mixture, fingerprint."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from data_pieces import GEOMETRY, image_sample
from omegaconf import OmegaConf

from nemo_bluelm.config.schema import SourceConfig
from nemo_bluelm.data import plan
from nemo_bluelm.data.packs import PackedBatch
from nemo_bluelm.data.stream import PackStream
from nemo_bluelm.data.writer import write_shard
from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry


def equal(a: PackedBatch, b: PackedBatch) -> bool:
    return a.max_seqlen == b.max_seqlen and all(
        torch.equal(value, getattr(b, name)) for name, value in vars(a).items() if isinstance(value, torch.Tensor)
    )


def test_random_access_equals_sequential(data):
    first = PackStream(data, GEOMETRY, seed=7)
    packs = [first[i] for i in range(20)]
    again = PackStream(data, GEOMETRY, seed=7)
    assert again.fingerprint == first.fingerprint
    for i in (19, 3, 0, 11, 3):
        assert equal(again[i], packs[i])
    assert not equal(packs[0], packs[1])
    assert not equal(PackStream(data, GEOMETRY, seed=8)[0], packs[0])


@pytest.mark.parametrize("alignment", [1, 16])
def test_pack_agrees_with_the_index(data, alignment):
    stream = PackStream(data, GEOMETRY, seed=7, alignment=alignment)
    samples = list(stream.index.values())
    for i in range(30):
        pack = stream[i]
        drawn = [samples[draw.source][draw.sample] for draw in stream.plan.pack(i)]
        lengths = pack.cu_seqlens.diff().tolist()
        assert lengths[: len(drawn)] == [sample.tokens for sample in drawn]
        assert pack.tokens.shape == (1, 512) and pack.cu_seqlens_padded[-1] == 512
        assert (pack.cu_seqlens_padded % alignment == 0).all()
        assert pack.tiles.shape == (sum(sample.tiles for sample in drawn), 3, 56, 56)
        assert len(pack.tiles) <= 64
        assert int((pack.tokens == stream.tokenizer.image).sum()) == len(pack.tiles) * GEOMETRY.tokens_per_tile


def test_tiles_belong_to_their_documents(small):
    """One image document in a pack: its tiles are those of its own image."""
    from nemo_bluelm.data.images import load_tiles

    stream = PackStream(small, GEOMETRY, seed=0)
    samples = list(stream.index.values())
    seen = 0
    for i in range(6):
        images = [samples[d.source][d.sample] for d in stream.plan.pack(i) if d.source == 0]
        expected = [load_tiles(image_sample("x", s.images[0].width, 8).images["0.png"], GEOMETRY) for s in images]
        assert torch.equal(stream[i].tiles, torch.cat(expected)) if images else len(stream[i].tiles) == 0
        seen += len(images)
    assert seen > 5


def test_mixture_by_tokens_over_300_packs(data):
    stream = PackStream(data, GEOMETRY, seed=7)
    samples, tokens = list(stream.index.values()), [0, 0, 0]
    for i in range(300):
        for draw in stream.plan.pack(i):
            tokens[draw.source] += samples[draw.source][draw.sample].tokens
    assert [count / sum(tokens) for count in tokens] == pytest.approx([0.6, 0.2, 0.2], rel=0.02)
    shares = [part["share"] for part in stream.summary().values()]
    assert shares == pytest.approx([0.6, 0.2, 0.2], rel=0.02)
    assert stream.summary()["digits"]["samples"] == 2874


def test_planning_reads_no_payload(small, monkeypatch):
    stream = PackStream(small, GEOMETRY, seed=7)
    monkeypatch.setattr(type(stream._reader), "read", lambda *_: pytest.fail("read"))
    stream.plan.pack(200)


def test_long_text_gives_each_target_once(small):
    from nemo_bluelm.data.writer import RawSample

    text = " ".join(f"word{n}" for n in range(400))
    write_shard(Path(small.root) / "text-0.tar", [RawSample("long", {"text": text})])
    del small.sources["images"]
    stream = PackStream(small, GEOMETRY, seed=7)
    pieces, ids = stream.index["text"], {}
    for i in range(len(pieces)):
        pack = stream[i]
        for k, draw in enumerate(stream.plan.pack(i)):
            if draw.epoch == 0:
                start = int(pack.cu_seqlens_padded[k])
                for j in range(pieces[draw.sample].tokens - 1):
                    assert pack.loss_mask[0, start + j] == 1
                    ids[pieces[draw.sample].start + 1 + j] = int(pack.labels[0, start + j])
    whole = [*stream.tokenizer.encode(text), stream.tokenizer.eos]
    assert [ids[i] for i in sorted(ids)] == whole[: len(ids)] and len(ids) > len(whole) // 2


def test_fingerprint_follows_what_matters(small, tmp_path_factory, monkeypatch):
    def fingerprint(geometry=GEOMETRY, seed=1, alignment=1, **changes):
        return PackStream(dataclasses.replace(small, **changes), geometry, seed, alignment).fingerprint

    base = fingerprint()
    assert base == fingerprint()
    assert base == PackStream(OmegaConf.structured(small), GEOMETRY, 1).fingerprint
    moved = tmp_path_factory.mktemp("moved") / "corpus"
    shutil.copytree(small.root, moved)
    assert base == fingerprint(root=str(moved))

    images, text = small.sources["images"], small.sources["text"]
    others = [
        fingerprint(seed=2),
        fingerprint(alignment=4),
        fingerprint(sequence_length=160),
        fingerprint(max_tiles=21),
        fingerprint(sources={"images": images, "text": SourceConfig(text.shards, 2.0)}),
        fingerprint(sources={"pictures": images, "text": text}),
        fingerprint(sources={"text": text, "images": images}),
        fingerprint(sources={"images": images}),
        fingerprint(geometry=dataclasses.replace(GEOMETRY, alpha=0.2)),
    ]
    tokenizer = Path(small.root) / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    others.append(fingerprint())
    write_shard(Path(small.root) / "images-0.tar", [image_sample(f"i{n}", 8 + 60 * n, 9) for n in range(5)])
    others.append(fingerprint())
    with monkeypatch.context() as patch:
        patch.setattr("nemo_bluelm.data.stream.WINDOW", plan.WINDOW + 1)
        others.append(fingerprint())
    assert len({base, *others}) == 1 + len(others)


def test_errors(small):
    with pytest.raises(UserError, match="data.sequence_length is 128, not a multiple of 48.*144"):
        PackStream(small, GEOMETRY, 0, alignment=48)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        small.sources["text"].weight = weight
        with pytest.raises(UserError, match="data.sources.text.weight is"):
            PackStream(small, GEOMETRY, 0)
    small.sources["text"].weight = 1.0
    small.tokenizer = "nowhere.json"
    with pytest.raises(UserError, match="nowhere.json does not exist"):
        PackStream(small, GEOMETRY, 0)


def test_changed_shard_is_noticed(small):
    stream = PackStream(small, Geometry(tile=56), seed=0)
    shard = Path(small.root) / "images-0.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole.replace(b"What?", b"Whut?"))
    with pytest.raises(UserError, match=r"images-0.tar: sample 'i\d' changed since"):
        [stream[i] for i in range(5)]
    shard.write_bytes(whole[:1000])
    with pytest.raises(UserError, match="images-0.tar is shorter"):
        [stream[i] for i in range(5)]


def test_broken_pixels_name_shard_and_sample(small):
    shard = Path(small.root) / "images-0.tar"
    broken = image_sample("bad", 100, 100)
    broken.images["0.png"] = broken.images["0.png"][:20000]
    write_shard(shard, [broken])
    stream = PackStream(small, GEOMETRY, seed=0)
    with pytest.raises(UserError, match="images-0.tar: sample 'bad': image bad.0.png does not decode"):
        [stream[i] for i in range(5)]
