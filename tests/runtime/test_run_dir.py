"""Which checkpoint a folder stands for."""

import pytest

from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import checkpoint_path, newest, published, read_metrics, resolve_checkpoint, step_of


def make_checkpoint(run_dir, step, without=()):
    folder = checkpoint_path(run_dir, step)
    (folder / "weights").mkdir(parents=True)
    for name in {"recipe.yaml", "tokenizer.json"} - set(without):
        (folder / name).touch()
    return folder


def test_newest_counts_steps_not_names_and_never_a_partial_one(tmp_path):
    for step in (99, 100_000_000, 2):  # the last has more digits than the padding
        make_checkpoint(tmp_path, step)
    for name in (".step_99999999999.partial", "step_00000099.bak"):
        (tmp_path / "checkpoints" / name / "weights").mkdir(parents=True)
    assert [step_of(folder) for folder in published(tmp_path)] == [2, 99, 100_000_000]
    assert step_of(newest(tmp_path)) == 100_000_000
    assert newest(tmp_path / "elsewhere") is None


def test_run_and_checkpoint_folders_resolve_to_the_same(tmp_path):
    folder = make_checkpoint(tmp_path, 5)
    assert resolve_checkpoint(str(tmp_path), "init_from") == folder
    assert resolve_checkpoint(str(folder), "init_from") == folder


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "has no checkpoint"),
        (lambda path: make_checkpoint(path, 3, without=["tokenizer.json"]), "tokenizer.json is missing"),
    ],
)
def test_what_is_no_checkpoint_is_said(make, expected, tmp_path):
    make(tmp_path / "run")
    with pytest.raises(UserError, match=expected) as error:
        resolve_checkpoint(str(tmp_path / "run"), "init_from")
    assert "init_from" in str(error.value)


@pytest.mark.parametrize("garbage", [b"garbage", b"7", b'{"loss": 1}', b'{"step": "x"}', b"\xff\x00", b""])
def test_a_line_of_garbage_among_the_metrics_is_named(garbage, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + garbage + b'\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl line 2 is .*, no step's metrics; remove it"):
        read_metrics(tmp_path)


def test_metrics_end_before_a_line_that_was_cut_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]
