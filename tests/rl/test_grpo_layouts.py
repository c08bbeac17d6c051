"""A GRPO step in every layout and packing against one process: replies, loss, gradients; and against sums by hand."""

import json
from pathlib import Path

import pytest
import torch

from tests.rl.grpo_runs import beginner, forks, write_recipe  # noqa: F401
from tests.runtime.layouts import SETTINGS, Run, relative
from tests.runtime.processes import torchrun

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("grpo_layout_worker.py")
# Two updates of the same replies, every term of the loss, and what divides by sequences.
RICH = [
    *("train.global_batch_size=8", "grpo.num_iterations=2", "train.steps=8", "grpo.loss.policy_loss=gspo"),
    *("grpo.loss.aggregation=seq_mean_token_mean", "grpo.loss.reference_policy_kl_penalty=0.1"),
    *("grpo.loss.entropy_coeff=0.01", "grpo.generation.temperature=0.7", "grpo.loss.rollout_correction.type=tis"),
    "grpo.loss.kl_in_reward=true",
]
PLAIN = ["train.steps=2", "grpo.thinking.budget_tokens=3", "grpo.thinking.closing_text=well"]
DYNAMIC = [*PLAIN, "grpo.dynamic_sampling.enabled=true", "grpo.dynamic_sampling.max_gen_batches=3"]
for task in ("digits", "problems"):
    DYNAMIC += [f"~environments.{task}.rewards.hashed", f"+environments.{task}.rewards.coarse.weight=1"]
RUNS = {
    "one": PLAIN,
    "one-rich": RICH,
    "one-dynamic": DYNAMIC,
    "one-long": [*PLAIN, "data.sequence_length=512"],
    "one-document": [*PLAIN, "data.max_documents=1"],
    "one-documents-rich": [*RICH, "data.max_documents=3"],
    "one-batch": [*PLAIN, "grpo.generation.batch=4"],
    "data": [*PLAIN, "parallel.overlap=true"],
    "data-plain": [*PLAIN, "parallel.overlap=false"],
    "data-rich": [*RICH, "parallel.overlap=true"],
    "data-dynamic": [*DYNAMIC, "parallel.overlap=true"],
    "tensor": [*PLAIN, "parallel.tensor=2"],
    "tensor-all-tiles": [*PLAIN, "parallel.tensor=2", "parallel.share_tiles=false"],
    "tensor-rich": [*RICH, "parallel.tensor=2"],
}


@pytest.fixture(scope="module")
def trained(corpus, beginner, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("grpo_layouts")
    data = [f"data.root={corpus}", f"init_from={beginner}"]
    settings = [one for one in SETTINGS if one.startswith("optim")]
    settings += ["grpo.generation.top_k=20"]  # of fewer tokens rounding hardly ever makes another be drawn
    runs = {name: [*data, *settings, *overrides] for name, overrides in RUNS.items()}
    (folder / "runs.json").write_text(json.dumps(runs))
    torchrun(2, WORKER, write_recipe(folder), folder, folder / "runs.json", timeout=500)
    return folder


def ranks_of(folder: Path) -> list[dict]:
    return [torch.load(file, "cpu", weights_only=False) for file in sorted(folder.glob("rank*.pt"))]


def replies_of(folder: Path) -> list[list[tuple]]:
    """Of every rollout what was written, by group and number, whatever rank it was on."""
    ranks = [rank["replies"] for rank in ranks_of(folder)]
    return [sorted({reply for rank in ranks for reply in rank[step]}) for step in range(len(ranks[0]))]


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("one", "one-rich", "one-dynamic")])
def test_layout_equals_one_process(name, trained):
    kind = name.rpartition("-")[2]
    alone = trained / (f"one-{kind}" if kind in ("rich", "dynamic") else "one")
    assert replies_of(trained / name) == replies_of(alone)
    run, one = Run(trained / name), Run(alone)
    assert run.losses == pytest.approx(one.losses, rel=1e-5, abs=1e-6)
    for step, (found, expected) in enumerate(zip(run.grads, one.grads, strict=True)):
        for weight, gradient in expected.items():
            error = relative(found[weight], gradient)
            assert error < 1e-4, f"step {step}: gradient of {weight} is off by {error:.1e}"
    for weight, value in one.weights.items():
        assert relative(run.weights[weight], value) < 1e-4, weight


def test_the_runs_are_about_something(trained):
    """Images, both modes, thoughts that the budget closed, rewards that differ, gradients everywhere."""
    first = replies_of(trained / "one")[0]
    assert len({reward for *_, reward in first}) > 8
    assert any(any(injected[1:]) for *_, injected, _ in first)
    assert any(not any(injected) for *_, injected, _ in first)
    run = Run(trained / "one")
    assert all(gradient.any() for gradient in run.grads[0].values())


def test_each_reply_alone_by_hand_gives_the_loss_and_the_gradients(trained):
    rank = ranks_of(trained / "one")[0]
    by_hand, first = rank["by_hand"], rank["first"]
    assert rank["losses"][0] == pytest.approx(by_hand["loss"], abs=1e-5)
    assert by_hand["error"] < 1e-5
    assert by_hand["grads"].keys() == first.keys()
    for name, gradient in by_hand["grads"].items():
        assert relative(first[name], gradient) < 1e-4, name


def test_the_samplers_log_probabilities_are_the_training_graphs_at_another_temperature(trained):
    assert ranks_of(trained / "one-rich")[0]["by_hand"]["error"] < 1e-5
