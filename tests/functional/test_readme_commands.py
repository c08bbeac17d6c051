"""The README's commands, typed in their order in an empty folder, do what it says."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_bluelm.config.pipeline import load_pipeline
from nemo_bluelm.runtime.run_dir import METRICS_FILE
from tests.conftest import CHECKOUT

README = (CHECKOUT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith(("nemo-bluelm ", "tar "))
]
QUICKSTART = "nemo-bluelm quickstart --out outputs/quickstart"
FEW_STEPS = "train.steps=4 train.save_every=2 optim.warmup_steps=1 decay.optim.decay_steps=2"
STAGES = [stage.name for stage in load_pipeline("tiny/pipeline", []).stages if stage.teacher is None]


class Shell:
    """Runs commands in a folder, each on one core: no command of the README is faster with two."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}

    def start(self, line: str) -> subprocess.Popen:
        command = shlex.split(line)
        if command[0] == "nemo-bluelm":
            command[:1] = [sys.executable, "-m", "nemo_bluelm.cli.main"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=self.env, **pipes)

    def run(self, line: str, timeout: float = 720) -> None:
        self.finish(line, self.start(line), timeout)

    @staticmethod
    def finish(line: str, process: subprocess.Popen, timeout: float = 720) -> None:
        try:
            _, stderr = process.communicate(timeout=timeout)
        finally:
            process.kill()
        assert process.returncode == 0, f"{line}\n{stderr[-2000:]}"


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / METRICS_FILE).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_readme_commands_from_top_to_bottom(tmp_path):
    """What follows the quickstart needs its corpus, not what it trains, and begins as soon as the corpus is there.

    The quickstart's stages have a few steps here; ``test_quickstart_learns`` runs it as it is.
    """
    shell = Shell(tmp_path)
    place = COMMANDS.index(QUICKSTART)
    for line in COMMANDS[:place]:
        shell.run(line)
    quickstart = shell.start(f"{QUICKSTART} {FEW_STEPS}")
    try:
        while not (tmp_path / "outputs/quickstart/corpus").exists() and quickstart.poll() is None:
            time.sleep(0.1)
        for line in COMMANDS[place + 1 :]:
            shell.run(line)
        shell.finish(QUICKSTART, quickstart)
    finally:
        quickstart.kill()  # takes its training with it

    report = json.loads((tmp_path / "outputs/quickstart/report.json").read_text())
    assert report["held_out_images"] == 360 and [stage["stage"] for stage in report["stages"]] == STAGES
    runs = tmp_path / "outputs/runs"
    for name, steps in {"tiny_sft": 100, "short": 50, "two_ranks": 50}.items():
        curve = losses(runs / name)
        assert len(curve) == steps
        assert sum(curve[-10:]) < 0.8 * sum(curve[:10]), name


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_quickstart_learns(tmp_path):
    """Every stage does its work: the numbers that the README shows, to the differences between machines."""
    Shell(tmp_path).run(QUICKSTART, timeout=2200)
    report = json.loads((tmp_path / "outputs/quickstart/report.json").read_text())
    assert [stage["stage"] for stage in report["stages"]] == STAGES
    assert report["accuracy"] >= 0.85
    assert report["example"]["non_thinking"]["thought"] is None
    thinking = report["example"]["thinking"]
    assert thinking["finished"] and thinking["thought"] and thinking["answer"]
    assert all(mode["obeyed"] >= 0.95 for mode in report["problems"].values())
    stages = {stage["stage"]: stage for stage in report["stages"]}
    for name in ("text_teacher", "text_pretrain", "align_projector", "joint_pretrain", "reasoning_pretrain", "sft"):
        assert stages[name]["loss_last"] < stages[name]["loss_first"], name
