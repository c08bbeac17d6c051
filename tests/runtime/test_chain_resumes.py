"""A pipeline that is killed and started again ends as if nothing had happened."""

import json
import time

import pytest

from nemo_bluelm.config.pipeline import load_pipeline
from tests.chains import settings, write_chain
from tests.runtime.processes import TRAIN, anything_alive, kill, run, start

STEPS = 12
PACKAGED = "tiny/pipeline"
SHORT = {  # overrides that so few steps and so small batches need
    PACKAGED: [
        *("decay.optim.decay_steps=6", "rl.grpo.num_prompts_per_step=1", "rl.grpo.num_generations_per_prompt=2"),
        "rl.grpo.validation.max_samples=4",
    ]
}


def curve(folder):
    """(step, loss, grad_norm, lr) of every step of a run."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows]


def in_the_middle(stage):
    """Whether a stage has begun its work, and hasn't ended it."""
    if stage.teacher:
        return not stage.folder.exists() and any(stage.folder.parent.glob(f".{stage.name}.*.partial"))
    return STEPS // 3 <= len(curve(stage.folder)) < STEPS


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("pipeline", "killed_in"),
    [
        pytest.param(None, ["cut", "align"], id="pruning_and_one_stage"),
        pytest.param(PACKAGED, None, id="every_stage_of_the_tiny_pipeline"),
    ],
)
def test_killed_and_started_again_it_ends_bitwise_the_same(pipeline, killed_in, corpus, forks, tmp_path):
    """The uninterrupted chain is typed by hand, stage by stage."""
    pipeline = pipeline or write_chain(tmp_path)
    whole, killed = (
        [*settings(corpus, tmp_path / name, STEPS, save_every=5), *SHORT.get(pipeline, [])]
        for name in ("whole", "killed")
    )
    for stage in load_pipeline(pipeline, whole).stages:
        if stage.teacher:
            teacher = tmp_path / "whole" / stage.teacher
            run(
                "-m", "nemo_bluelm.cli.main", "prune", teacher, stage.folder, "--recipe", stage.recipe, *stage.overrides
            )
        else:
            forks.run(*TRAIN, stage.recipe, *stage.overrides)
    stages = load_pipeline(pipeline, killed).stages
    for stage in stages:
        if killed_in is not None and stage.name not in killed_in:
            continue
        process = start(*TRAIN, pipeline, *killed)
        end = time.monotonic() + 300
        while not in_the_middle(stage):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end, f"{stage.name} did not get on"
            time.sleep(0.02)
        kill(process)
        process.wait()
        assert not anything_alive(process), "the stage ends with its pipeline"
        assert in_the_middle(stage)
    run(*TRAIN, pipeline, *killed, timeout=400)
    for stage in (stage for stage in stages if not stage.teacher):
        assert curve(stage.folder) == curve(tmp_path / "whole" / stage.name), stage.name
        assert len(curve(stage.folder)) == STEPS
