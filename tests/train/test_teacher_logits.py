"""Stored logits: what is on disk is the teacher's, work goes on where it ended, and what doesn't fit is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.data.teacher_logits import shard_folder
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.environment import prepare
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE, WEIGHTS_DIR

prepare()

import torch  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402

from nemo_bluelm.config.compose import to_yaml  # noqa: E402
from nemo_bluelm.data.packs import PackedBatch, join  # noqa: E402
from nemo_bluelm.model.init import initialize  # noqa: E402
from nemo_bluelm.runtime.single import (  # noqa: E402
    STATE_PREFIX,
    build_model,
    load_model,
    single_process_world,
)
from nemo_bluelm.train.packs import open_packs  # noqa: E402
from nemo_bluelm.train.teacher_logits import make  # noqa: E402

TOP_K = 7


@pytest.fixture(scope="module")
def recipe(corpus, tmp_path_factory):
    """Of half of the corpus' text, in short packs, so that texts are split."""
    folder = tmp_path_factory.mktemp("recipe")
    shards = "data.sources.text.shards=[text-train-0000.tar]"
    keys = [
        f"data.root={corpus}",
        f"data.index={folder / 'index'}",
        "data.sequence_length=256",
        shards,
        "~data.sources.needle",
    ]
    shape = ["model.language.hidden_size=64", "model.language.ffn_hidden_size=64"]
    return load_recipe("tiny/text_teacher", [*keys, *shape])


@pytest.fixture(scope="module")
def teacher(recipe, tmp_path_factory):
    """A checkpoint with weights drawn at random."""
    folder = tmp_path_factory.mktemp("teacher")
    (folder / RECIPE_FILE).write_text(to_yaml(recipe))
    tokenizer = open_packs(recipe).tokenizer
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.content)
    (folder / WEIGHTS_DIR).mkdir()
    with single_process_world():
        model = build_model(recipe, tokenizer.image)
        initialize(model, recipe.model.language, 3)
        dist_checkpointing.save(model.sharded_state_dict(prefix=STATE_PREFIX), str(folder / WEIGHTS_DIR))
    return folder


@pytest.fixture(scope="module")
def stored(recipe, teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("stored") / "logits"
    assert make(str(teacher), recipe, out, TOP_K) == 1
    return out


def loader_of(recipe, folder, **keys):
    return open_packs(replace(recipe, distill=replace(recipe.distill, logits=str(folder), **keys)))


@pytest.mark.slow
def test_packs_carry_what_the_teacher_says_of_them(recipe, teacher, stored):
    """Also where other documents, and other pieces of a split text, lie around them than when they were stored."""
    loader = loader_of(recipe, stored, top_k=5)
    split = 0
    with single_process_world():
        model, _, _ = load_model(teacher)
        for _ in range(6):
            loaded = loader.load(next(loader.plan))
            batch = loaded.batch
            with torch.inference_mode():
                best = model(batch)[0].log_softmax(1).topk(5, 1)
            for document, start in zip(loaded.documents, batch.bounds):
                rows = slice(start, start + document.length - 1)
                split += document.start > 0
                scores = batch.teacher_scores[0, rows].float()
                assert (scores - best.values[rows]).abs().max() < 0.01
                same = (batch.teacher_ids[0, rows] == best.indices[rows]).float().mean()
                assert same > 0.99  # ties of fp16 aside
            assert not batch.teacher_scores.isnan().any()
    assert split > 3


@pytest.mark.slow
def test_all_tokens_from_disk_teach_as_the_dense_divergence(recipe, teacher, tmp_path):
    """KL(teacher || student) of stored logits of the whole vocabulary, against its definition in fp64."""
    from nemo_bluelm.layers.divergence import top_k_divergence

    vocabulary = recipe.model.language.vocab_size
    short = replace(recipe, data=replace(recipe.data, sources={"text": few_texts(recipe, tmp_path)}))
    assert make(str(teacher), short, tmp_path / "logits", vocabulary, dtype="float32") == 1
    loader = loader_of(short, tmp_path / "logits")
    with single_process_world(), torch.inference_mode():
        model, _, _ = load_model(teacher)
        loaded = loader.load(next(loader.plan))
        batch = loaded.batch
        log_p = model(batch)[0].double().log_softmax(1)
        student = torch.randn(log_p.shape, generator=torch.Generator().manual_seed(1)) * 3
        wanted = (log_p.exp() * (log_p - student.double().log_softmax(1))).sum(1)
        scores = batch.teacher_scores[0]
        found = top_k_divergence(student, batch.teacher_ids[0], scores, 1.0, torch.distributed.group.WORLD)
    assert scores.dtype == torch.float32 and scores.size(1) == vocabulary
    for document, start in zip(loaded.documents, batch.bounds):
        rows = slice(start, start + document.length - 1)
        assert (found[rows].double() / wanted[rows] - 1).abs().max() < 1e-6
    assert loaded.documents


def few_texts(recipe, folder):
    """A source of a few texts, whose logits of all tokens don't fill the disk."""
    source = recipe.data.sources["text"]
    texts = folder / "few.jsonl"
    lines = [json.dumps({"text": "Call me Ishmael. Some years ago, never mind how long precisely."}) for _ in range(4)]
    texts.write_text("\n".join(lines) + "\n")
    return replace(source, shards=[str(texts)])


@pytest.mark.slow
def test_what_is_there_is_kept_and_what_is_missing_made(recipe, teacher, stored, tmp_path):
    assert make(str(teacher), recipe, stored, TOP_K) == 0
    assert make(str(teacher), recipe, tmp_path / "other", TOP_K, part=(1, 2)) == 0
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["meta.json"]
    with pytest.raises(UserError, match="has nothing of shard text-train-0000.tar; run tools/make_teacher_logits.py"):
        loader_of(recipe, tmp_path / "other")


@pytest.mark.slow
def test_what_does_not_fit_is_refused(recipe, teacher, stored, tmp_path):
    with pytest.raises(UserError, match="was made with top_k 7, and now it is 8; choose another folder"):
        make(str(teacher), recipe, stored, 8)
    with pytest.raises(
        UserError, match="distill.top_k or top_k_end is 8, but distill.logits .* has 7 tokens; lower it"
    ):
        loader_of(recipe, stored, top_k=8)
    with pytest.raises(UserError, match="distill.temperature is not 1, but of the likeliest 7 tokens"):
        loader_of(recipe, stored, temperature=2.0)
    with pytest.raises(UserError, match="has no readable meta.json"):
        loader_of(recipe, tmp_path)
    longer = replace(recipe, data=replace(recipe.data, sequence_length=384))
    loader = loader_of(longer, stored)
    with pytest.raises(UserError, match="made with another data.sequence_length"):
        loader.load(next(loader.plan))


@pytest.mark.slow
def test_a_damaged_shard_is_one_line(recipe, stored, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(stored, copy)
    loader = loader_of(recipe, copy)
    folder = shard_folder(copy, loader.plan.tables[0].shards[0].digest)
    (folder / "ids.npy").write_bytes(b"")
    with pytest.raises(UserError, match="is damaged .*; remove it and run tools/make_teacher_logits.py again"):
        loader.load(next(loader.plan))
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps({**meta, "version": 0}))
    with pytest.raises(UserError, match="has version 0, not 2"):
        loader_of(recipe, copy)


@pytest.mark.slow
def test_packs_keep_their_logits_on_the_wire_and_joined(recipe, stored):
    loader = loader_of(recipe, stored)
    one, two = (loader.load(next(loader.plan)).batch for _ in range(2))
    again = PackedBatch.text_from_bytes(one.text_to_bytes())
    both = join([one, two])
    for name, dtype in (("teacher_ids", np.int32), ("teacher_scores", np.float16)):
        assert getattr(one, name).numpy().dtype == dtype
        assert torch.equal(getattr(again, name), getattr(one, name))
        assert torch.equal(getattr(both, name), torch.cat([getattr(one, name), getattr(two, name)], 1))
