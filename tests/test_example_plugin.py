"""The example package, installed as any other: it adds to ours and changes nothing of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
PLUGIN = CHECKOUT / "examples" / "plugin"
RECIPE = PLUGIN / "nemo_bluelm_example" / "recipes" / "questions.yaml"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder of installed packages with the example in it."""
    place, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(PLUGIN, source)  # building leaves files behind
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", place]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, source], check=True)
    return place


@pytest.fixture
def data(corpus, tmp_path):
    """The corpus, with a table of questions."""
    root = tmp_path / "corpus"
    root.mkdir()
    for file in corpus.iterdir():
        (root / file.name).symlink_to(file)
    rows = "".join(f'"What is {n} + {n}?","It is, of course, {2 * n}."\n' for n in range(60))
    (root / "questions.csv").write_text(f"question,answer\n{rows}")
    return root


def call(place, *words, python=()):
    command = [sys.executable, *(python or ("-m", "nemo_bluelm.cli.main")), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT}{os.pathsep}{place}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_its_stage_tower_source_and_exporter_work(installed, data, tmp_path):
    run_dir = tmp_path / "run"
    settings = [f"data.root={data}", f"data.index={tmp_path / 'index'}", f"run_dir={run_dir}", "train.steps=3"]
    done = call(installed, "train", RECIPE, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and rows[-1]["loss"] <= 9.0 < rows[0]["loss"] + 2
    assert rows[-1]["tokens_by_source"]["questions"] > 0
    (table,) = (tmp_path / "index" / "converted").glob("questions-*.jsonl")
    record = json.loads(table.read_text().splitlines()[3])
    assert record["messages"][1] == {"role": "assistant", "content": "It is, of course, 6."}

    done = call(installed, "export", "words", run_dir, tmp_path / "words")
    assert done.returncode == 0 and (tmp_path / "words" / "words.txt").stat().st_size > 1000
    done = call(installed, "export", "hf", run_dir, tmp_path / "hf")
    assert done.returncode == 2 and "vision tower grey, which no exported model knows" in done.stderr

    (data / "questions.csv").write_text("query,answer\n1,2\n")
    done = call(installed, "train", RECIPE, *settings, f"run_dir={tmp_path / 'other'}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "data.sources.questions: the reader csv_questions can't read questions.csv: KeyError" in done.stderr


def test_its_reward_is_found(installed):
    program = (
        "from nemo_bluelm.rl.environments.registry import make_reward\n"
        "from nemo_bluelm.rl.environments.base import Episode, Said\n"
        "import dataclasses\n"
        "said = Said(**{field.name: None for field in dataclasses.fields(Said)} | {'answer': 'one two three four'})\n"
        "reward = make_reward('short', {'words': 2}, 'here')\n"
        "print(reward.score(Episode('task', {}, said)).value)\n"
    )
    done = call(installed, python=("-c", program))
    assert done.stdout.strip() == "0.5", done.stderr


@pytest.mark.parametrize(
    "override, expected",
    [
        ("stage=cappd", "no nemo_bluelm.stages entry cappd"),
        ("data.sources.questions.reader=excel", "no nemo_bluelm.data_sources entry excel"),
        ("model.vision.tower=siglip", "no nemo_bluelm.vision_towers entry siglip; did you mean siglip2?"),
    ],
)
def test_a_name_that_nobody_registered_is_one_line(override, expected, installed, data, tmp_path):
    settings = [f"data.root={data}", f"data.index={tmp_path / 'index'}", f"run_dir={tmp_path / 'run'}"]
    done = call(installed, "train", RECIPE, *settings, override)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].count(expected) == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_of_ours_knows_the_example():
    for file in (CHECKOUT / "nemo_bluelm").rglob("*.py"):
        assert "nemo_bluelm_example" not in file.read_text(), file
