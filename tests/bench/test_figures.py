"""What is made of step times, and what becomes of a case that fails."""

import json
import time

import pytest
import torch

from nemo_bluelm.bench import hf_run, train
from nemo_bluelm.bench.figures import is_out_of_memory, rates, stalls
from nemo_bluelm.config.compose import load_recipe


def test_rates_are_medians_of_each_step():
    found = rates([1.0, 2.0, 4.0], [100, 400, 100], [8e12, 8e12, 8e12], gpus=2, peak=4e12)
    assert found["step_seconds"] == {"median": 2.0, "min": 1.0, "max": 4.0}
    assert found["tokens_per_second"] == 100.0  # 100, 200, 25
    assert found["tflops"] == 2.0 and found["mfu"] == 0.5
    assert rates([1.0], [1], [1], gpus=1, peak=None)["mfu"] is None


def test_which_errors_are_about_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(ValueError("out of memory"))


@pytest.fixture
def recipe():
    return load_recipe("tiny/sft", ["init_from=somewhere", "optim.warmup_steps=10"])


def killed(arguments: list[str]) -> int:
    return -9


def test_case_that_dies_is_a_row(recipe):
    assert train.measure(recipe, 2, 1, killed) == {"name": "tiny_sft", "error": "the run ended with exit code -9"}
    rows = hf_run.measure(recipe, 2, 1, killed)
    assert rows == [{"name": "transformers", "error": "the process ended with exit code -9"}]


def test_case_is_the_recipe_for_the_steps_asked_for(recipe, tmp_path):
    seen = []

    def start(arguments):
        seen.append((arguments, load_recipe(arguments[2], [])))
        return 1

    train.measure(recipe, 2, 1, start, profile=tmp_path / "kernels.txt")
    (arguments, case), wanted = seen[0], recipe
    assert arguments[:2] == ["bench", "train"] and str(tmp_path / "kernels.txt") in arguments
    assert case.train.steps == 4 and case.optim.warmup_steps == 4  # one more step for the profile
    assert case.init_from is None and case.run_dir != wanted.run_dir
    assert case.model == wanted.model and case.data == wanted.data and case.parallel == wanted.parallel


OURS = {"name": "x", "tokens_per_second": 300.0, "parameters": {"vision": 2, "projector": 1, "language": 7}}


def test_ratio_is_to_the_best_of_the_peer():
    rows = [
        {"name": "a", "tokens_per_second": 100.0, "parameters": 7},
        {"name": "b", "tokens_per_second": 200.0, "parameters": 10},
        {"name": "c", "error": "out of memory"},
    ]
    found = hf_run.compare(OURS, rows)
    assert (found["best"], found["ratio"]) == ("b", 1.5)
    assert hf_run.compare(None, rows)["ratio"] is None
    assert hf_run.compare(OURS, rows[2:])["best"] is None
    assert hf_run.compare({"name": "x", "error": "out of memory"}, rows)["ratio"] is None


def test_models_of_other_sizes_are_not_compared():
    found = hf_run.compare(OURS, [{"name": "a", "tokens_per_second": 100.0, "parameters": 8}])
    assert found["ratio"] is None and "the peer has 8 weights and ours 10" in found["note"]


def test_rows_survive_the_process(recipe):
    def start(arguments):
        path = arguments[arguments.index("--worker") + 1]
        with open(path, "a") as file:
            file.write(json.dumps({"name": "first"}) + "\n")
        return 1

    assert [row["name"] for row in hf_run.measure(recipe, 2, 1, start)] == ["first", "transformers"]


def test_waiting_is_the_time_in_the_loader():
    from nemo_bluelm.bench.watch import _Fed

    def slow():
        for number in range(3):
            time.sleep(0.05 * (number == 1))
            yield number

    waited = []
    for _ in _Fed(slow(), waited.append):
        time.sleep(0.02)  # training, which doesn't count
    assert len(waited) == 3 and waited[1] >= 0.05 and waited[0] < 0.02 and waited[2] < 0.02


def test_stalls_are_what_the_steps_after_a_checkpoint_took_longer():
    seconds = [1.0] * 12
    seconds[3] += 0.5  # of the run's step 6, the first after the checkpoint of step 5
    seconds[5] += 0.25  # where it was published
    seconds[8] += 0.5  # after that of step 10
    assert stalls(seconds, before=2, save_every=5) == {"stalls": [0.75], "longest": [0.5], "of_a_step": 0.75}
    assert stalls(seconds, before=2, save_every=4) == {"stalls": [0.75, 0.5], "longest": [0.5, 0.5], "of_a_step": 0.625}
    assert stalls(seconds, before=2, save_every=40) == {"stalls": [], "longest": [], "of_a_step": None}
