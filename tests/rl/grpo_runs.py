"""Short GRPO runs of a model that has hardly learnt, and what the trainer's tests ask of them."""

import json
import os
from pathlib import Path

import pytest

from tests.runtime.forks import Forks
from tests.runtime.processes import TRAIN

MODULES = Path(__file__).with_name("modules")  # those that processes import
RECIPE = """
defaults:
  - model: tiny
  - data: prompts
  - parallel: single
  - precision: fp32
  - optim: adamw
  - _self_
name: small_grpo
objective: grpo
init_from: ???
model:
  language:
    yarn:
      factor: 8.0
data:
  sequence_length: 256
grpo:
  num_prompts_per_step: 4
  num_generations_per_prompt: 4
  max_prompt_length: 200
  generation:
    max_new_tokens: 10
    batch: 16
optim:
  lr: 1.0e-3
  warmup_steps: 0
  schedule: constant
train:
  steps: 2
  global_batch_size: 16
environments:
  digits: &rewards
    imports: [grpo_rewards]
    truncated: score  # replies of a model that has hardly learnt end by their length alone
    num_workers: 1
    rewards: REWARDS
  problems: *rewards
"""


def write_recipe(folder: Path, rewards: str = "{hashed: {}}", name: str = "small_grpo") -> Path:
    """A recipe of short replies with the same rewards for digits and problems."""
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.replace("REWARDS", rewards))
    return path


def command(recipe: Path, corpus: Path, start: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [*TRAIN, recipe, f"data.root={corpus}", f"init_from={start}", f"run_dir={run_dir}", *overrides]


def curve(run_dir: Path) -> list[dict]:
    """Every step's figures but those about time, as written."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_second", "tflops", "mfu")
    return [
        {
            name: value
            for name, value in row.items()
            if name not in timed and not name.startswith("timing/") and not name.endswith("/latency")
        }
        for row in rows
    ]


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """Forks that find the tests' rewards; as long as they are there other processes find them too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(MODULES), os.environ.get("PYTHONPATH")))))
        forks = Forks(tmp_path_factory.mktemp("forks"))
        yield forks
        forks.close()


@pytest.fixture(scope="module")
def beginner(corpus, forks, tmp_path_factory):
    """A run of one step: a checkpoint whose model is as good as random."""
    run_dir = tmp_path_factory.mktemp("beginner") / "run"
    settings = [f"data.root={corpus}", f"run_dir={run_dir}", "init_from=null", "train.steps=1", "optim.lr=1e-6"]
    forks.run(*TRAIN, "recipes/tiny/sft.yaml", *settings, "optim.warmup_steps=0", "train.global_batch_size=1")
    return run_dir
