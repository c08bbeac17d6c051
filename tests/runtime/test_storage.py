"""Damaged checkpoints and full disks, through the command line: one line, and nothing half-written."""

import shutil
import subprocess

import pytest

from tests.runtime.processes import TRAIN, finish, start

PACKS = ["train.global_batch_size=1", "data.sequence_length=256", "~data.sources.needle"]  # whose documents are longer
SHORT = ["train.save_every=2", "optim.warmup_steps=1", *PACKS]
DAMAGE = {
    "weights cut": lambda folder: (folder / "weights" / "__0_0.distcp").write_bytes(b"\x80\x02"),
    "weights missing": lambda folder: (folder / "weights" / "__0_1.distcp").unlink(),
    "state overwritten": lambda folder: (folder / "weights" / "common.pt").write_text("x"),
    "metadata missing": lambda folder: (folder / "weights" / ".metadata").unlink(),
}


def command(corpus, run_dir, steps):
    return [*TRAIN, "tiny/sft", f"data.root={corpus}", f"run_dir={run_dir}", f"train.steps={steps}", *SHORT]


@pytest.fixture(scope="module")
def four_steps(corpus, forks, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    forks.run(*command(corpus, run_dir, 4))
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_the_way_out(damage, four_steps, corpus, forks, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(four_steps, run_dir)
    newest = run_dir / "checkpoints" / "step_00000004"
    DAMAGE[damage](newest)
    code, output = forks.start(*command(corpus, run_dir, 5)).finish(timeout=120)
    assert code == 2
    notice, error = output.splitlines()
    assert "train.steps is 5, but was 4" in notice, output
    assert error.startswith("nemo-bluelm: error:") and str(newest) in error and "is damaged" in error, output
    if damage == "weights cut":
        shutil.rmtree(newest)
        forks.run(*command(corpus, run_dir, 5))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_one_line_and_keeps_the_checkpoints_before(processes, corpus, forks, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        run = [*command(corpus, disk / "run", 8), "train.keep_checkpoints=-1"]
        if processes == 2:
            code, output = finish(start(*run, "--nproc", "2", "train.global_batch_size=2"), timeout=120)
        else:
            code, output = forks.start(*run).finish(timeout=120)
        left = sorted(folder.name for folder in (disk / "run" / "checkpoints").iterdir())
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert code == 2
    assert output.count("\n") == 1 and "can't be written" in output and "MiB are free" in output, output
    assert left and not [name for name in left if "partial" in name]
