"""Damaged checkpoints and full disks, through the command line: one line, and nothing half-written."""

import json
import os
import shutil
import subprocess

import pytest

from nemo_bluelm.errors import UserError
from tests.runtime.processes import TRAIN, finish, start

PACKS = ["train.global_batch_size=1", "data.sequence_length=256", "~data.sources.needle"]  # whose documents are longer
SHORT = ["train.save_every=2", "optim.warmup_steps=1", *PACKS]
DAMAGE = {
    "weights cut": lambda folder: (folder / "weights" / "__0_0.distcp").write_bytes(b"\x80\x02"),
    "weights missing": lambda folder: (folder / "weights" / "__0_1.distcp").unlink(),
    "state overwritten": lambda folder: (folder / "weights" / "common.pt").write_text("x"),
    "metadata missing": lambda folder: (folder / "weights" / ".metadata").unlink(),
    "recipe cut": lambda folder: (folder / "recipe.yaml").write_bytes((folder / "recipe.yaml").read_bytes()[:700]),
    "checksums missing": lambda folder: (folder / "checksums.json").unlink(),
}
FILE = {"recipe cut": "recipe.yaml", "checksums missing": "checksums.json"}


def command(corpus, run_dir, steps):
    return [*TRAIN, "tiny/sft", f"data.root={corpus}", f"run_dir={run_dir}", f"train.steps={steps}", *SHORT]


@pytest.fixture(scope="module")
def four_steps(corpus, forks, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    forks.run(*command(corpus, run_dir, 4))
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(damage, four_steps, corpus, forks, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(four_steps, run_dir)
    newest = run_dir / "checkpoints" / "step_00000004"
    DAMAGE[damage](newest)
    assert (run_dir / "complete").exists()
    told, *_ = forks.run(*command(corpus, run_dir, 4)).splitlines()
    assert told.startswith(f"checkpoint {newest} is damaged: {FILE.get(damage, 'weights/')}"), told
    assert told.endswith("; it is step_00000004.damaged now, and the run goes on from step_00000002"), told
    assert (run_dir / "metrics.jsonl").read_text().count("\n") == 4
    left = {folder.name for folder in newest.parent.iterdir()}
    assert left == {"step_00000002", "step_00000004", "step_00000004.damaged"}
    starts = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [(row["event"], row["step"]) for row in starts] == [("start", 0), ("start", 2)]


def test_an_error_of_another_rank_is_not_called_damage(four_steps):
    """The last rank's death reaches the others as a RuntimeError in what they do just then."""
    from nemo_bluelm.runtime.environment import prepare

    prepare()
    from nemo_bluelm.runtime.storage import reading

    checkpoint = four_steps / "checkpoints" / "step_00000004"
    with pytest.raises(RuntimeError, match="Connection closed by peer"), reading(checkpoint):
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(UserError, match="is damaged"), reading(checkpoint.parent):
        raise RuntimeError("no checkpoint, so no checksums")


@pytest.mark.slow
def test_where_no_checkpoint_is_whole_nothing_is_moved(four_steps, corpus, forks, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(four_steps, run_dir)
    steps = [run_dir / "checkpoints" / f"step_0000000{step}" for step in (2, 4)]
    for step in steps:
        DAMAGE["weights cut"](step)
    code, output = forks.start(*command(corpus, run_dir, 5)).finish(timeout=120)
    assert code == 2 and output.count("\n") == 1
    assert f"checkpoint {steps[1]} is damaged: weights/__0_0.distcp has 2 bytes" in output
    assert "none before it is whole" in output and f"remove {steps[0].parent} to begin anew" in output
    assert all(step.is_dir() for step in steps)


@pytest.mark.slow
def test_a_damaged_checkpoint_of_another_run_is_no_start(four_steps, corpus, forks, tmp_path):
    shutil.copytree(four_steps, tmp_path / "first")
    newest = tmp_path / "first" / "checkpoints" / "step_00000004"
    DAMAGE["state overwritten"](newest)
    fork = forks.start(*command(corpus, tmp_path / "second", 5), f"init_from={tmp_path / 'first'}")
    code, output = fork.finish(timeout=120)
    assert code == 2 and output.count("\n") == 1
    assert f"init_from: checkpoint {newest} is damaged: weights/common.pt has 1 bytes" in output

    (newest / "checksums.json").unlink()  # as one that an earlier version wrote: it is seen when it is read
    DAMAGE["weights cut"](newest)
    code, output = forks.start(*command(corpus, tmp_path / "third", 5), f"init_from={tmp_path / 'first'}").finish(120)
    assert code == 2 and f"checkpoint {newest} is damaged (" in output.splitlines()[-1]


@pytest.fixture
def disk(tmp_path):
    """A disk of 20 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_one_line_and_keeps_the_checkpoints_before(processes, corpus, forks, disk):
    run = [*command(corpus, disk / "run", 8), "train.keep_checkpoints=-1"]
    if processes == 2:
        code, output = finish(start(*run, "--nproc", "2", "train.global_batch_size=2"), timeout=120)
    else:
        code, output = forks.start(*run).finish(timeout=120)
    left = sorted(folder.name for folder in (disk / "run" / "checkpoints").iterdir())
    assert code == 2
    assert output.count("\n") == 1 and "can't be written" in output and "MiB are free" in output, output
    assert left and not [name for name in left if "partial" in name]


@pytest.mark.parametrize("free", [0, 40, 4000, 2**20])
def test_torch_save_on_a_full_disk_is_one_line(free, disk):
    import torch

    from nemo_bluelm.runtime.storage import writing

    (disk / "full").write_bytes(bytes(20 * 2**20))
    os.truncate(disk / "full", 20 * 2**20 - free)
    with pytest.raises(UserError, match="can't be written"), writing(disk):
        torch.save({"weights": torch.zeros(2**20)}, disk / "common.pt")
