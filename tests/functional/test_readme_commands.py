"""The README's commands, typed in their order in an empty folder, do what it says."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_bluelm.runtime.run_dir import METRICS_FILE
from tests.conftest import CHECKOUT

README = (CHECKOUT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith(("nemo-bluelm ", "tar "))
]


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / METRICS_FILE).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_readme_commands_from_top_to_bottom(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    for line in COMMANDS:
        command = shlex.split(line)
        if command[0] == "nemo-bluelm":
            command[:1] = [sys.executable, "-m", "nemo_bluelm.cli.main"]
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=720)
        assert result.returncode == 0, f"{line}\n{result.stderr[-2000:]}"

    report = json.loads((tmp_path / "outputs/quickstart/report.json").read_text())
    assert report["accuracy"] >= 0.85 and report["held_out_images"] == 360
    assert report["example"]["non_thinking"]["thought"] is None
    thinking = report["example"]["thinking"]
    assert thinking["finished"] and thinking["thought"] and thinking["answer"]
    for stage in report["stages"]:
        assert stage["loss_last"] < stage["loss_first"]

    runs = tmp_path / "outputs/runs"
    for name, steps in {"tiny_sft": 100, "short": 50, "two_ranks": 50}.items():
        curve = losses(runs / name)
        assert len(curve) == steps
        assert sum(curve[-10:]) < 0.8 * sum(curve[:10]), name
