"""A pipeline checks all its stages before the first one, and leaves those that are finished."""

import re

import pytest

from nemo_bluelm.atomic import write_atomically
from nemo_bluelm.config.compose import load_recipe, to_yaml
from nemo_bluelm.config.pipeline import load_pipeline
from nemo_bluelm.runtime.run_dir import COMPLETE_FILE, checkpoint_path
from nemo_bluelm.train import chain
from tests import chains
from tests.conftest import one_line

STEPS = 8


@pytest.fixture
def pipeline(tmp_path):
    return chains.write_chain(tmp_path)


def settings(corpus, folder):
    return chains.settings(corpus, folder, STEPS, save_every=3)


def mark_done(folder, stage, step=STEPS):
    """A stage that has ended, as far as its folder is looked at before training."""
    checkpoint = checkpoint_path(stage.folder, step)
    checkpoint.mkdir(parents=True)
    write_atomically(stage.folder / COMPLETE_FILE, f"{step}\n".encode())
    write_atomically(checkpoint / "recipe.yaml", to_yaml(load_recipe(stage.recipe, list(stage.overrides))).encode())


@pytest.fixture
def started(monkeypatch):
    """The command lines of stages, which are not run."""
    commands = []

    def start(command, environment):
        commands.append(command[3:])
        return 0

    monkeypatch.setattr(chain, "_run", start)
    return commands


def test_stages_run_in_order_with_their_commands(corpus, pipeline, tmp_path, cli, started):
    code, _, shown = cli("train", pipeline, *settings(corpus, tmp_path / "runs"), "--nproc", "2")
    assert code == 0
    assert [command[:2] for command in started] == [
        ["train", "tiny/text_teacher"],
        ["prune", str(tmp_path / "runs" / "teacher")],
        ["train", "tiny/align_projector"],
        ["train", "tiny/align_projector"],
    ]
    assert f"init_from='{tmp_path / 'runs' / 'cut'}'" in started[2]
    assert [command[-2:] == ["--nproc", "2"] for command in started] == [True, False, True, True]
    assert "chain  stage 2 of 4, cut: pruning to the shape of tiny/align_projector" in shown


def test_finished_stages_are_left(corpus, pipeline, tmp_path, cli, started):
    overrides = settings(corpus, tmp_path / "runs")
    mark_done(tmp_path, load_pipeline(pipeline, overrides).stage("teacher"))
    code, _, shown = cli("train", pipeline, *overrides)
    assert code == 0 and [command[0] for command in started] == ["prune", "train", "train"]
    assert "stage 1 of 4, teacher: complete" in shown


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("joint.optim.lrr=1", ["stage joint", "unknown key optim.lrr; did you mean optim.lr?"]),
        ("joint.optim.lr=-1", ["stage joint", "optim.lr is -1"]),
        ("joint.parallel.tensor=2", ["stage joint", "tensor"]),
        ("joint.model.language.ffn_hidden_size=192", ["stage joint", "ffn_hidden_size is 192, but init_from"]),
        ("joint.data.sources.text.shards=[none.tar]", ["stage joint", "none.tar"]),
        ("joint.init_from=/no/such/run", ["stage joint", "init_from is /no/such/run, which does not exist"]),
        ("cut.model.language.num_attention_heads=3", ["stage cut", "model.language"]),
    ],
)
def test_a_mistake_in_a_late_stage_is_told_before_the_first(
    override, expected, corpus, pipeline, tmp_path, cli, started
):
    code, _, error = cli("train", pipeline, *settings(corpus, tmp_path / "runs"), override)
    line = one_line(code, error)
    assert [part for part in expected if part not in line] == [], line
    assert started == [] and not (tmp_path / "runs").exists()


def test_a_stage_made_from_one_that_is_gone_is_refused(corpus, pipeline, tmp_path, cli, started):
    overrides = settings(corpus, tmp_path / "runs")
    mark_done(tmp_path, load_pipeline(pipeline, overrides).stage("align"))
    code, _, error = cli("train", pipeline, *overrides)
    assert "stage align: " in one_line(code, error) and "made from stage cut, and that stage isn't finished" in error
    assert started == []


def test_a_changed_recipe_of_a_finished_stage_is_refused(corpus, pipeline, tmp_path, cli, started):
    overrides = settings(corpus, tmp_path / "runs")
    mark_done(tmp_path, load_pipeline(pipeline, overrides).stage("teacher"))
    code, _, error = cli("train", pipeline, *overrides, "teacher.optim.lr=7")
    assert "stage teacher: optim.lr is 7.0, but the run in" in one_line(code, error)


def test_a_rank_of_a_launcher_starts_no_pipeline(pipeline, cli, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    code, _, error = cli("train", pipeline)
    assert "is a pipeline, which starts the ranks of its stages itself" in one_line(code, error)


@pytest.mark.parametrize("key, told", [("teacher", "distill.teacher is .*/absent"), ("logits", ".*/absent")])
def test_what_a_later_stage_learns_from_is_looked_for_first(key, told, corpus, pipeline, tmp_path, cli, started):
    overrides = [*settings(corpus, tmp_path / "runs"), f"joint.distill.{key}={tmp_path / 'absent'}"]
    code, _, error = cli("train", pipeline, *overrides)
    assert re.search(f"stage joint: .*{told}", one_line(code, error))
    assert started == [] and not (tmp_path / "runs").exists()
