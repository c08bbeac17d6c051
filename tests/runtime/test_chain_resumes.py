"""A pipeline that is killed and started again ends as if nothing had happened."""

import json
import time

import pytest

from nemo_bluelm.config.pipeline import load_pipeline
from tests.runtime.processes import TRAIN, anything_alive, kill, run, start

CHAIN = """
name: chain
stages:
  teacher: {recipe: tiny/text_teacher}
  cut: {prune: teacher, recipe: tiny/align_projector}
  align: {recipe: tiny/align_projector, overrides: ["init_from=${run:cut}"]}
  joint: {recipe: tiny/align_projector, overrides: ["init_from=${run:align}", "train.freeze=[]"]}
"""
STEPS = 12
TRAINED = ("teacher", "align", "joint")


@pytest.fixture
def pipeline(tmp_path):
    (tmp_path / "chain.yaml").write_text(CHAIN)
    return str(tmp_path / "chain.yaml")


def settings(corpus, folder):
    return [
        *(f"data.root={corpus}", f"data.index={corpus.parent / 'index'}", f"run_dir={folder}"),
        *(f"train.steps={STEPS}", "train.save_every=5", "train.global_batch_size=2", "optim.warmup_steps=1"),
    ]


def curve(folder):
    """(step, loss, grad_norm, lr) of every step of a run."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "killed_in", [pytest.param(["align"], id="one_stage"), pytest.param(TRAINED, id="all", marks=pytest.mark.long)]
)
def test_killed_and_started_again_it_ends_bitwise_the_same(killed_in, corpus, forks, pipeline, tmp_path):
    """The uninterrupted chain is typed by hand, stage by stage."""
    whole, killed = settings(corpus, tmp_path / "whole"), settings(corpus, tmp_path / "killed")
    for stage in load_pipeline(pipeline, whole).stages:
        if stage.teacher:
            teacher = tmp_path / "whole" / stage.teacher
            run(
                "-m", "nemo_bluelm.cli.main", "prune", teacher, stage.folder, "--recipe", stage.recipe, *stage.overrides
            )
        else:
            forks.run(*TRAIN, stage.recipe, *stage.overrides)
    for stage in killed_in:
        process = start(*TRAIN, pipeline, *killed)
        end = time.monotonic() + 300
        while len(curve(tmp_path / "killed" / stage)) < STEPS // 3:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end, f"{stage} did not get on"
            time.sleep(0.02)
        kill(process)
        process.wait()
        assert not anything_alive(process), "the stage ends with its pipeline"
        assert len(curve(tmp_path / "killed" / stage)) < STEPS
    run(*TRAIN, pipeline, *killed, timeout=400)
    for stage in TRAINED:
        assert curve(tmp_path / "killed" / stage) == curve(tmp_path / "whole" / stage), stage
        assert len(curve(tmp_path / "killed" / stage)) == STEPS
