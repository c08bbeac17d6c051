"""The commands of the README, typed in their order in an empty folder, and then those of docs/ do what is said.

Those that need a cluster, a GPU or weights of others are read as the program reads them.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from glob import glob
from pathlib import Path

import pytest

from nemo_bluelm.cli.main import parse
from nemo_bluelm.config.ablation import load_ablation
from nemo_bluelm.config.compose import load_without_data
from nemo_bluelm.config.pipeline import Stage, load_pipeline
from nemo_bluelm.data.curate.schema import load_recipe as load_curation
from nemo_bluelm.resources import find_recipe, packaged_recipes
from nemo_bluelm.runtime.run_dir import METRICS_FILE
from tests.conftest import CHECKOUT

README = (CHECKOUT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith(("nemo-bluelm ", "tar ", "python tools/"))
]
DOCS = [
    line
    for page in sorted((CHECKOUT / "docs").rglob("*.md"))
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line not in COMMANDS
]
TYPED = [
    line.removeprefix("$ ")
    for page in (CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md")))
    for kind, block in re.findall(r"^```(.*?)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    if kind in ("", "bash", "console")
    for line in block.replace("\\\n", " ").splitlines()
    if line.removeprefix("$ ").startswith("nemo-bluelm ")
]
REFUSED = dict(re.findall(r"^\$ (nemo-bluelm .*)\n(nemo-bluelm: error: .*\n)", README, re.MULTILINE))
STAND_INS = {"RECIPE": "sft"}
QUICKSTART = "nemo-bluelm quickstart --out outputs/quickstart"
FEW_STEPS = "train.steps=4 train.save_every=2 optim.warmup_steps=1 decay.optim.decay_steps=2"
FEW_STEPS += " rl.grpo.validation.max_samples=8"
ABLATION = "nemo-bluelm ablate yarn"
REWARD_MODEL = "nemo-bluelm train recipes/tiny/reward_model.yaml init_from=outputs/runs/tiny_sft"
SERVE = "nemo-bluelm serve outputs/runs/tiny_sft --port 8000"
CURL = re.search(r"^curl http://.*?(?=^```)", README, re.DOTALL | re.MULTILINE)[0]
LITTLE_MEASURED = "train.steps=2 train.save_every=2 optim.warmup_steps=1 needle.lengths=[64,128] needle.count=1"
SHORTER = {ABLATION: [LITTLE_MEASURED], REWARD_MODEL: ["train.steps=4 train.save_every=2 optim.warmup_steps=1"]}
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
        elif command[0] == "python":
            files = [sorted(glob(word, root_dir=self.folder)) if "*" in word else [word] for word in command[2:]]
            command = [sys.executable, str(CHECKOUT / command[1]), *(word for words in files for word in words)]
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

    def ask_server(self, line: str, request: str) -> dict:
        """The answer to a request of the server that ``line`` starts; at a free port, for 8000 may be taken."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        server = self.start(line.replace("8000", port))
        try:
            assert f"http://127.0.0.1:{port}/v1" in server.stdout.readline()
            answer = subprocess.run(["bash", "-c", request.replace("8000", port)], capture_output=True, text=True)
            server.terminate()
            self.finish(line, server, timeout=60)
        finally:
            server.kill()
        return json.loads(answer.stdout)


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / METRICS_FILE).read_text().splitlines()]


@pytest.mark.parametrize("line", [line for line in dict.fromkeys(TYPED) if line not in REFUSED])
def test_every_command_is_one(line):
    """The program knows its options, recipes, stages and keys."""
    args = parse([STAND_INS.get(word, word) for word in shlex.split(line)[1:]])
    recipe, overrides = getattr(args, "recipe", None), getattr(args, "overrides", [])
    if args.command == "launch" and recipe in ("status", "logs", "cancel"):
        assert len(overrides) == 1
        return
    if args.command == "ablate":
        stages = load_ablation(args.name, overrides).chain.stages
    elif recipe in packaged("curate"):
        load_curation(find_recipe(recipe, "curate"), overrides)
        return
    elif recipe in packaged("pipeline"):
        stages = load_pipeline(recipe, overrides).stages
    elif recipe is not None:
        stages = [Stage("", recipe, tuple(overrides), Path(), ())]
    else:
        return
    for stage in stages:
        load_without_data(stage.recipe, list(stage.overrides))
    of_stages = {text.rpartition("=")[0] for text in getattr(args, "nodes", [])}
    assert of_stages <= {"", *(stage.name for stage in stages)}


def packaged(kind: str) -> set[str]:
    """Packaged recipes of a kind, by the names and by the files that commands take."""
    return {form for name in packaged_recipes(kind) for form in (name, f"recipes/{name}.yaml")}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_refused_is_refused_as_shown(line, cli):
    assert cli(*shlex.split(line)[1:]) == (2, "", REFUSED[line])


def test_blocks_of_every_kind_are_read():
    assert {"nemo-bluelm launch status /shared/runs", QUICKSTART, *REFUSED} <= set(TYPED) and REFUSED
    assert any(line.startswith("nemo-bluelm launch ") and "--nodes" in line for line in TYPED)
    assert set(re.findall(r"^nemo-bluelm .*[^\\]$", README, re.MULTILINE)) <= set(TYPED)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_readme_commands_from_top_to_bottom(tmp_path):
    """What follows the quickstart needs its corpus, not what it trains, and begins as soon as the corpus is there.

    The quickstart's and the ablation's runs have a few steps here; ``test_quickstart_learns`` runs the former as it is.
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
            if line == SERVE:
                (choice,) = shell.ask_server(line, CURL)["choices"]
                assert choice["message"]["reasoning_content"] and choice["message"]["content"]
            else:
                shell.run(" ".join([line, *SHORTER.get(line, [])]))
        shell.finish(QUICKSTART, quickstart)
        for line in DOCS:
            shell.run(line)
    finally:
        quickstart.kill()  # takes its training with it

    assert (tmp_path / "outputs/runs/tiny_sft/report.html").stat().st_size > 50_000
    assert (tmp_path / "outputs/compared.html").exists() and (tmp_path / "outputs/quickstart/report.html").exists()
    report = json.loads((tmp_path / "outputs/quickstart/report.json").read_text())
    assert report["export"]["passed"] and report["sampled"]["after"]["step"] > 0
    assert report["held_out_images"] == 360 and [stage["stage"] for stage in report["stages"]] == STAGES
    runs = tmp_path / "outputs/runs"
    for name, steps in {"tiny_sft": 100, "short": 50, "two_ranks": 50}.items():
        curve = losses(runs / name)
        assert len(curve) == steps
        assert sum(curve[-10:]) < 0.8 * sum(curve[:10]), name
    ablation = tmp_path / "outputs/ablations/yarn"
    assert "numbers found in 128 tokens" in (ablation / "table.md").read_text()
    assert list(json.loads((ablation / "table.json").read_text())["variants"]) == ["yarn", "plain"]
    assert (ablation / "plot.png").stat().st_size > 10_000


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_quickstart_learns(tmp_path):
    """Every stage does its work: the numbers that the README shows, to the differences between machines."""
    Shell(tmp_path).run(QUICKSTART, timeout=2200)
    report = json.loads((tmp_path / "outputs/quickstart/report.json").read_text())
    assert [stage["stage"] for stage in report["stages"]] == STAGES
    assert report["accuracy"] >= 0.85 and report["export"]["passed"]
    before, after = (report["sampled"][when]["val/accuracy"] for when in ("before", "after"))
    assert after > before
    assert report["example"]["non_thinking"]["thought"] is None
    thinking = report["example"]["thinking"]
    assert thinking["finished"] and thinking["thought"] and thinking["answer"]
    assert all(mode["obeyed"] >= 0.95 for mode in report["problems"].values())
    stages = {stage["stage"]: stage for stage in report["stages"]}
    for name, stage in stages.items():
        assert name in ("long_context", "rl") or (stage["last"] < stage["first"]) == (stage["measure"] == "loss"), name
    text = {name: stage["held_out_text_loss"] for name, stage in stages.items()}
    assert text["joint_pretrain"] <= 1.02 * text["align_projector"] and text["sft"] <= 1.02 * text["joint_pretrain"]
    assert stages["decay"]["needles_found"]["2560"] <= 0.3  # five times its context, without YaRN
    for name in ("long_context", "sft"):
        assert stages[name]["needles_found"]["512"] >= 0.8 and stages[name]["needles_found"]["2560"] >= 0.5, name
