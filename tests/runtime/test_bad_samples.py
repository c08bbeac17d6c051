"""Images that don't decode: a run goes on, and every rank of every layout leaves the same samples out."""

import json
import shutil
import time

import pytest

from nemo_bluelm.data.ledger import Ledger
from nemo_bluelm.data.shards import scan
from tests.runtime.processes import TRAIN

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def damaged(corpus, tmp_path_factory):
    """The corpus with every 20th digit damaged behind its header."""
    root = shutil.copytree(corpus, tmp_path_factory.mktemp("damaged") / "corpus")
    for shard in root.glob("digits-train-*.tar"):
        groups = list(scan(str(shard)))
        with open(shard, "r+b") as file:
            for group in groups[::20]:
                offset, size = group.members["0.png"]
                file.seek(offset + size // 2)
                file.write(bytes(8))
    return root


SOURCES = ("digits", "photos", "text", "prose", "needle")  # of tiny/sft


def command(root, tmp_path, *overrides):
    data = [f"data.root={root}", f"data.index={tmp_path / 'index'}", "train.steps=6", "optim.warmup_steps=2"]
    return [
        *TRAIN,
        "recipes/tiny/sft.yaml",
        *data,
        f"run_dir={tmp_path / 'run'}",
        "train.global_batch_size=4",
        *overrides,
    ]


def rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(damaged, forks, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("alone")
    forks.run(*command(damaged, tmp_path))
    return rows(tmp_path), Ledger(tmp_path / "index" / "quarantine.jsonl").entries()


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2", "parallel.tensor=1"])
def test_every_rank_leaves_out_the_same_samples(layout, alone, damaged, forks, tmp_path):
    """Tensor parallel: one rank decodes, the other gets its tiles. Pipeline: the last stage masks the loss."""
    expected, ledger = alone
    forks.run(*command(damaged, tmp_path, layout), ranks=2)
    assert [row["loss"] for row in rows(tmp_path)] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
    for row, other in zip(rows(tmp_path), expected):
        assert row["loss_by_source"] == pytest.approx(other["loss_by_source"], rel=1e-5)
    assert rows(tmp_path)[-1]["bad_samples"] > 0
    found = Ledger(tmp_path / "index" / "quarantine.jsonl").entries()
    assert len(found) == len({(entry.shard, entry.offset) for entry in found})
    trained = {entry.key for entry in ledger} & {entry.key for entry in found}  # each also met some loaded ahead
    assert len(trained) > 3
    assert all(entry.stage == "decode" and "image 0.png" in entry.error for entry in found)


def test_too_many_bad_samples_end_the_run_with_one_line(damaged, forks, tmp_path):
    code, output = forks.start(*command(damaged, tmp_path, "data.max_bad_fraction=0.001")).finish(timeout=120)
    assert code == 2
    message = output.splitlines()[-1]
    assert "data.max_bad_fraction 0.001" in message and "image 0.png" in message
    assert "Traceback" not in output


def test_the_data_can_end_before_the_training(corpus, forks, tmp_path):
    """What was trained is saved, and said."""
    epochs = [f"data.sources.{name}.max_epochs=0.02" for name in SOURCES]
    code, output = forks.start(*command(corpus, tmp_path, *epochs, "train.steps=50")).finish(timeout=120)
    assert code == 2
    message, steps = output.splitlines()[-1], len(rows(tmp_path))
    assert f"the data ends after {steps} of 50 steps" in message and "max_epochs" in message
    assert "Traceback" not in output
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == f"step_{steps:08d}"


def test_a_shard_deleted_while_two_ranks_train(corpus, forks, tmp_path):
    """The rank that reads and the one that is told agree on what was lost."""
    from nemo_bluelm.data.writer import RawSample, write_shard

    root = tmp_path / "corpus"
    root.mkdir()
    shutil.copy(corpus / "tokenizer.json", root)
    for number in range(200):  # more than the files that stay open
        write_shard(root / f"t-{number:03d}.tar", [RawSample(f"t{number}", {"text": f"number {number} " * 60})])
    settings = [
        "+data.sources={x: {shards: [t-*.tar]}}",
        *(f"~data.sources.{name}" for name in SOURCES),
    ]
    settings += ["data.max_bad_fraction=1", "train.steps=40", "parallel.tensor=2"]
    ranks = forks.start_ranks(2, *command(root, tmp_path, *settings))
    metrics = tmp_path / "run" / "metrics.jsonl"
    while ranks[0].running() and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        time.sleep(0.05)
    for shard in list(root.glob("*.tar"))[::2]:
        shard.unlink()
    for rank in ranks:
        code, output = rank.finish(timeout=240)
        assert code == 0, output[-2000:]
    assert rows(tmp_path)[-1]["bad_samples"] > 0 and len(rows(tmp_path)) == 40


def test_the_corpus_may_be_behind_a_url(corpus, forks, tmp_path):
    """Index, tokenizer, records and images through fsspec give what the folder gives."""
    for name, root in (("url", f"file://{corpus}"), ("folder", corpus)):
        (tmp_path / name).mkdir()
        forks.run(*command(root, tmp_path / name, "train.steps=3"))
    assert [row["loss"] for row in rows(tmp_path / "url")] == [row["loss"] for row in rows(tmp_path / "folder")]
