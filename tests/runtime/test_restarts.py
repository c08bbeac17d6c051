"""Ranks that are killed or hang: all are started again, and the run ends as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.runtime.processes import TRAIN, anything_alive, descendants, finish, run, start
from tests.runtime.test_resume import command, curve, wait_for_step

# Of each stage of the tiny pipeline.
FEW_STEPS = [
    "train.steps=24",
    "train.save_every=6",
    "optim.warmup_steps=2",
    "decay.optim.decay_steps=8",
    "rl.train.steps=4",
]


def ranks(process):
    """Process ids of the ranks, by rank."""
    found = {}
    for pid in descendants(process):
        try:
            environment = dict(
                entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in entry
            )
        except OSError:
            continue
        if "RANK" in environment:
            found.setdefault(int(environment["RANK"]), pid)
    return found


@pytest.fixture(scope="module")
def of_two(corpus, forks, tmp_path_factory):
    """The curve of a run of two ranks that nothing happens to."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    forks.run(*command(corpus, run_dir), ranks=2)
    return curve(run_dir)


@pytest.mark.slow
def test_a_hang_is_written_down_and_ended_and_a_killed_rank_started_again(of_two, corpus, tmp_path):
    run_dir = tmp_path / "run"
    settings = ["--nproc", "2", "--max-restarts", "2", "train.hang_timeout=25"]
    process = start(*command(corpus, run_dir, *settings))
    wait_for_step(run_dir, 6, process)
    os.kill(ranks(process)[1], signal.SIGSTOP)
    stacks = run_dir / "stacks" / "rank_0.txt"
    for _ in range(1200):
        if stacks.exists():
            break
        time.sleep(0.1)
    wait_for_step(run_dir, 15, process)
    os.kill(ranks(process)[0], signal.SIGKILL)
    code, output = finish(process, timeout=240)
    assert code == 0, output[-3000:]
    assert "started again, restart 1 of 2" in output and "started again, restart 2 of 2" in output
    assert "no step ended for 25 s after step" in output and str(stacks) in output
    assert "nemo_bluelm/train/run.py" in stacks.read_text() and " in fit\n" in stacks.read_text()
    assert curve(run_dir) == of_two
    events = [json.loads(line)["event"] for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert events.count("start") == 3 and "hang" in events


@pytest.mark.slow
def test_a_users_mistake_is_not_tried_again(corpus, tmp_path):
    diverging = ["optim.lr=1e30", "optim.parts.vision.lr=1e30", "optim.clip_grad=0", "optim.vision_layer_decay=1"]
    settings = ["--nproc", "2", "--max-restarts", "5", *diverging]
    code, output = finish(start(*command(corpus, tmp_path / "run", *settings)), timeout=120)
    assert code == 2 and "NaN or infinite" in output
    assert "started again" not in output


@pytest.mark.long
def test_ft_launcher_ends_a_rank_that_hangs_and_the_run_goes_on(of_two, corpus, tmp_path):
    """nvidia-resiliency-ext's launcher, which hears heartbeats of our steps."""
    pytest.importorskip("nvidia_resiliency_ext", reason="pip install nvidia-resiliency-ext")
    run_dir = tmp_path / "run"
    launcher = ["-m", "nvidia_resiliency_ext.fault_tolerance.launcher", "--nproc-per-node=2", "--max-restarts=1"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--ft-param-rank_heartbeat_timeout=20"]
    process = start(*launcher, "--ft-param-initial_rank_heartbeat_timeout=120", *command(corpus, run_dir))
    wait_for_step(run_dir, 8, process)
    os.kill(ranks(process)[1], signal.SIGSTOP)
    code, output = finish(process, timeout=240)
    assert code == 0, output[-3000:]
    assert curve(run_dir) == of_two
    assert (run_dir / "fault_tolerance" / "finished").exists()


def weights_of(folder):
    """Checksums of the weights and optimizer state in the last checkpoint of each stage, by stage and file."""
    found = {}
    for stage in sorted(path for path in folder.iterdir() if path.is_dir()):
        for file in (
            sorted((stage / "checkpoints").glob("step_*"))[-1:] if (stage / "checkpoints").is_dir() else [stage]
        ):
            rows = json.loads((file / "checksums.json").read_text()) if (file / "checksums.json").exists() else {}
            found |= {(stage.name, name): row for name, row in rows.items() if name.endswith(".distcp")}
    return found


@pytest.mark.long
@pytest.mark.timeout(6000)
def test_twenty_kills_of_random_ranks_in_the_tiny_pipeline_change_no_bit(corpus, tmp_path):
    """Of 2 ranks, at random moments of the whole pipeline, starts and saves among them."""
    settings = [*TRAIN, "tiny/pipeline", f"data.root={corpus}", f"data.index={tmp_path / 'index'}", "--nproc", "2"]
    settings += FEW_STEPS
    begun = time.monotonic()
    run(*settings, f"run_dir={tmp_path / 'whole'}", timeout=3000)
    seconds = time.monotonic() - begun

    dice, kills = random.Random(7), 0
    folder = tmp_path / "killed"
    process = start(*settings, f"run_dir={folder}", "--max-restarts", "20")
    while process.poll() is None and kills < 20:
        time.sleep(dice.uniform(0.3, 1.7) * seconds / 24)
        there = ranks(process)
        if there and process.poll() is None:
            os.kill(dice.choice(list(there.values())), signal.SIGKILL)
            kills += 1
    code, output = finish(process, timeout=3000)
    assert code == 0, output[-3000:]
    assert not anything_alive(process)
    print(f"{kills} kills, {output.count('started again')} restarts, {seconds:.0f} s undisturbed")
    assert kills == 20 and output.count("started again") >= 18  # some kill ranks that a kill before had ended
    assert weights_of(folder) == weights_of(tmp_path / "whole") and len(weights_of(folder)) > 20
    shutil.rmtree(folder)
