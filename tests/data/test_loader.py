"""From packs to tensors: what lies in a row, holes where samples are bad, the ledger, resume by content."""

import hashlib
import os
import random
import shutil
import threading
from itertools import islice
from pathlib import Path

import pytest
import torch
from data_pieces import GEOMETRY, image_sample

from nemo_bluelm.config.schema import ControlToken, SourceConfig
from nemo_bluelm.data.decode import get_backend
from nemo_bluelm.data.files import Files
from nemo_bluelm.data.loader import prefetch
from nemo_bluelm.data.open import open_data
from nemo_bluelm.data.packs import PackedBatch
from nemo_bluelm.data.writer import RawSample, write_shard
from nemo_bluelm.errors import UserError

BACKENDS = ("torch", "pil", "dali")


def digest(batch: PackedBatch) -> str:
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


def load(loader, count):
    return [loader.load(pack) for pack in islice(loader.plan, count)]


def damage(root: Path, shard: str, sample) -> None:
    """Overwrite the middle of a sample's first image, a PNG, behind its header."""
    entry = sample.images[0]
    with open(root / shard, "r+b") as file:
        file.seek(entry.member.offset + entry.member.size // 2)
        file.write(bytes(8))


@pytest.mark.parametrize("alignment", [1, 16])
def test_pack_agrees_with_its_documents(data, alignment):
    loader = open_data(data, GEOMETRY, seed=7, alignment=alignment)
    for loaded in load(loader, 30):
        batch, documents = loaded.batch, loaded.documents
        assert not loaded.holes
        lengths = batch.cu_seqlens.diff().tolist()
        assert lengths[: len(documents)] == [document.length for document in documents]
        assert sum(lengths[len(documents) :]) == 0
        assert batch.tokens.shape == (1, 512) and batch.cu_seqlens_padded[-1] == 512
        assert (batch.cu_seqlens_padded % alignment == 0).all()
        assert batch.tiles.shape == (sum(document.sample.tiles for document in documents), 3, 56, 56)
        images = int((batch.tokens == loader.tokenizer.image).sum())
        assert images == len(batch.tiles) * GEOMETRY.tokens_per_tile


def test_control_token_stands_where_the_recipe_says(data):
    after = load(open_data(data, GEOMETRY, seed=7), 4)
    data.chat.control_token = ControlToken.before_query
    before = load(open_data(data, GEOMETRY, seed=7), 4)
    thoughts = 0
    for first, second in zip(after, before):
        loader = open_data(data, GEOMETRY, seed=7)
        control, human = loader.tokenizer.blue_think, loader.tokenizer.human
        rows = [loaded.batch.tokens[0].tolist() for loaded in (first, second)]
        counts = [row.count(control) for row in rows]
        assert counts[0] == counts[1] and sorted(rows[0]) == sorted(rows[1])
        thoughts += counts[0]
        assert [row[row.index(control) - 1] == human for row in rows] == [False, True]
    assert thoughts


def test_tiles_belong_to_their_documents(small):
    loader, backend, seen = open_data(small, GEOMETRY, seed=0), get_backend("torch"), 0
    for loaded in load(loader, 6):
        images = [d.sample for d in loaded.documents if d.source == "images"]
        data = [image_sample("x", sample.images[0].width, 8).images["0.png"] for sample in images]
        expected = backend.tiles(data, GEOMETRY)
        assert torch.equal(loaded.batch.tiles, torch.cat(expected)) if images else len(loaded.batch.tiles) == 0
        seen += len(images)
    assert seen > 5


def test_long_text_gives_each_target_once(small):
    text = " ".join(f"word{n}" for n in range(400))
    write_shard(Path(small.root) / "text-0.tar", [RawSample("long", {"text": text})])
    del small.sources["images"]
    small.sources["text"].max_epochs = 1
    loader, targets = open_data(small, GEOMETRY, seed=7), {}
    for loaded in map(loader.load, loader.plan):
        for place, document in enumerate(loaded.documents):
            start = int(loaded.batch.cu_seqlens_padded[place])
            for j in range(document.length - 1):
                assert loaded.batch.loss_mask[0, start + j] == 1
                assert document.start + 1 + j not in targets
                targets[document.start + 1 + j] = int(loaded.batch.labels[0, start + j])
    whole = [*loader.tokenizer.encode(text), loader.tokenizer.eos]
    assert [targets[i] for i in sorted(targets)] == whole


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rest_of_the_stream_is_the_same_wherever_it_stopped(backend, data):
    """Tokens and pixels, after 20 stops; only packs behind the stop are read."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    data.decode.backend = backend
    whole = [digest(loaded.batch) for loaded in load(open_data(data, GEOMETRY, seed=7), 16)]
    assert len(set(whole)) == 16
    for cut in random.Random(1).choices(range(16), k=20):
        first, second = open_data(data, GEOMETRY, seed=7), open_data(data, GEOMETRY, seed=7)
        load(first, cut)
        second.plan.restore(first.plan.state())
        assert [digest(loaded.batch) for loaded in load(second, 16 - cut)] == whole[cut:]


def test_a_moved_corpus_is_the_same_stream_and_a_changed_one_is_refused(small, tmp_path_factory):
    before = open_data(small, GEOMETRY, seed=1)
    state = before.plan.state()
    moved = tmp_path_factory.mktemp("moved") / "corpus"
    shutil.copytree(small.root, moved)
    small.root = str(moved)
    open_data(small, GEOMETRY, seed=1).plan.restore(state)
    write_shard(moved / "images-0.tar", [image_sample(f"i{n}", 8 + 60 * n, 9) for n in range(5)])
    with pytest.raises(UserError, match="content of data.sources.images.shards"):
        open_data(small, GEOMETRY, seed=1).plan.restore(state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_image_is_a_hole_and_its_neighbours_keep_their_pixels(backend, data, tmp_path):
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    data.root = str(shutil.copytree(data.root, tmp_path / "corpus"))
    data.decode.backend = backend
    good = load(open_data(data, GEOMETRY, seed=7), 12)
    victim = next(d for loaded in good for d in loaded.documents if d.source == "digits")
    damage(Path(data.root), victim.sample.shard, victim.sample)
    # A shard's size and time tell the index whether it changed; damage to the medium changes neither.
    shard = Path(data.root) / victim.sample.shard
    indexed = shard.stat()
    loader = open_data(data, GEOMETRY, seed=7)
    os.utime(shard, ns=(indexed.st_atime_ns, indexed.st_mtime_ns))

    bad = load(loader, 12)
    holes = [(n, place) for n, loaded in enumerate(bad) for place in loaded.holes]
    assert holes
    for number, (before, after) in enumerate(zip(good, bad)):
        a, b = before.batch, after.batch
        assert torch.equal(a.cu_seqlens, b.cu_seqlens) and torch.equal(a.cu_seqlens_padded, b.cu_seqlens_padded)
        tiles, kept = iter(a.tiles.split([d.sample.tiles for d in before.documents])), []
        for place, document in enumerate(after.documents):
            row = slice(int(a.cu_seqlens_padded[place]), int(a.cu_seqlens_padded[place + 1]))
            own = next(tiles)
            if (number, place) in holes:
                assert document.sample == victim.sample and "image 0" in document.bad
                assert b.loss_mask[0, row].sum() == 0 and (b.tokens[0, row] == loader.tokenizer.pad).all()
            else:
                assert document.bad is None
                assert torch.equal(a.tokens[0, row], b.tokens[0, row])
                assert torch.equal(a.loss_mask[0, row], b.loss_mask[0, row])
                kept.append(own)
        assert torch.equal(torch.cat(kept), b.tiles)
    (entry,) = loader.plan.index.ledger.entries()
    assert (Path(entry.shard).name, entry.key, entry.stage) == (victim.sample.shard, victim.sample.key, "decode")
    assert loader.bad_samples == len(holes)


def test_quarantine_applied_leaves_the_sample_out_and_refuses_the_old_state(small):
    root = Path(small.root)
    loader = open_data(small, GEOMETRY, seed=0)
    state, victim = loader.plan.state(), loader.plan.tables[0].locate(3)[0]
    damage(root, victim.shard, victim)
    loader = open_data(small, GEOMETRY, seed=0)
    load(loader, 4)
    assert [entry.key for entry in loader.plan.index.ledger.entries()] == [victim.key]
    assert loader.plan.index.ledger.apply() == 1
    clean = open_data(small, GEOMETRY, seed=0)
    keys = {document.sample.key for loaded in load(clean, 8) for document in loaded.documents}
    assert victim.key not in keys and clean.bad_samples == 0
    with pytest.raises(UserError, match="quarantine of data.sources.images is 1 samples"):
        clean.plan.restore(state)


def test_a_shard_deleted_while_training_is_holes_with_reasons(small):
    loader = open_data(small, GEOMETRY, seed=0)
    os.remove(Path(small.root) / "images-0.tar")
    packs = load(loader, 4)
    for document in (d for loaded in packs for d in loaded.documents):
        assert (document.bad is not None) == (document.source == "images")
    entries = loader.plan.index.ledger.entries()
    assert {(Path(entry.shard).name, entry.stage) for entry in entries} == {("images-0.tar", "read")}
    assert len(entries) == len({entry.key for entry in entries}) == 5
    assert "images-0.tar" in entries[0].error


def test_too_many_bad_samples_stop_the_run_with_the_last_reason(small):
    loader = open_data(small, GEOMETRY, seed=0)
    os.remove(Path(small.root) / "images-0.tar")
    with pytest.raises(
        UserError, match=r"\d+ of 1\d\d samples could not be read .* data.max_bad_fraction 0.1.*images-0"
    ):
        load(loader, 100)


def test_a_changed_record_is_a_hole(small):
    loader = open_data(small, GEOMETRY, seed=0)
    shard = Path(small.root) / "images-0.tar"
    shard.write_bytes(shard.read_bytes().replace(b"What?", b"Whut?"))
    reasons = {d.bad for loaded in load(loader, 4) for d in loaded.documents if d.source == "images"}
    assert reasons == {"its JSON changed since it was indexed"}


def test_a_pack_of_holes_only_has_no_target(small):
    del small.sources["text"]
    loader = open_data(small, GEOMETRY, seed=0)
    os.remove(Path(small.root) / "images-0.tar")
    (loaded,) = load(loader, 1)
    assert len(loaded.holes) == len(loaded.documents) and loaded.batch.num_tokens == 0
    assert loaded.batch.tiles.shape == (0, 3, 56, 56)


def test_planning_and_opening_read_no_payload(small, monkeypatch):
    open_data(small, GEOMETRY, seed=7)
    read = Files.read

    def no_shards(files, path, *place):
        assert not path.endswith(".tar")
        return read(files, path, *place)

    monkeypatch.setattr(Files, "read", no_shards)
    loader = open_data(small, GEOMETRY, seed=7)
    list(islice(loader.plan, 200))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_prefetch_keeps_the_order_and_stays_within_its_bound(threads):
    asked, lock = [], threading.Lock()

    def square(n):
        with lock:
            asked.append(n)
        return n * n

    results = prefetch(iter(range(100)), square, threads, ahead=4)
    assert [next(results) for _ in range(10)] == [n * n for n in range(10)]
    results.close()
    assert max(asked) < 10 + 5
    assert list(prefetch(iter(range(7)), square, threads, 4)) == [n * n for n in range(7)]


def test_prefetch_delivers_what_comes_before_a_failure():
    def fail_at_five(n):
        if n == 5:
            raise UserError("five")
        return n

    results, seen = prefetch(iter(range(9)), fail_at_five, 2, 4), []
    with pytest.raises(UserError, match="five"):
        for result in results:
            seen.append(result)
    assert seen == [0, 1, 2, 3, 4]


def test_errors(small):
    small.sources["text"] = SourceConfig(["nothing-*.tar"])
    with pytest.raises(UserError, match=r"data.sources.text.shards: .*nothing-\*.tar"):
        open_data(small, GEOMETRY, 0)
    small.sources = {}
    with pytest.raises(UserError, match="data.sources is empty"):
        open_data(small, GEOMETRY, 0)
    small.tokenizer = "nowhere.json"
    small.sources["text"] = SourceConfig(["text-*.tar"])
    with pytest.raises(UserError, match="nowhere.json does not exist"):
        open_data(small, GEOMETRY, 0)
