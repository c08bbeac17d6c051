"""Which updates are left out, and when there are too many of them."""

import json
import math
from types import SimpleNamespace

import pytest

from nemo_bluelm.runtime.environment import prepare

prepare()  # before anything imports Megatron-Core

import torch  # noqa: E402

from nemo_bluelm.errors import UserError  # noqa: E402
from nemo_bluelm.runtime.single import single_process_world  # noqa: E402
from nemo_bluelm.train.bad_steps import LEAST, WINDOW, BadSteps  # noqa: E402


@pytest.fixture(autouse=True)
def world():
    with single_process_world():
        yield


class Run:
    """Drives the callback as the optimizer does."""

    def __init__(self, run_dir, most=2, spike_factor=0.0):
        self.guard = BadSteps(run_dir, "probe", most, spike_factor)
        self.events, optimizer = run_dir / "events.jsonl", SimpleNamespace()
        trainer = SimpleNamespace(
            global_step=0, is_global_zero=True, optimizers=[SimpleNamespace(mcore_optimizer=optimizer)]
        )
        self.guard.on_train_start(trainer)
        self.trainer, self.takes = trainer, optimizer.takes

    def step(self, loss=2.0, norm=1.0):
        taken = self.takes(torch.tensor(loss), torch.tensor(norm, dtype=torch.float64))
        self.trainer.global_step += 1
        return taken

    def told(self):
        return [(row["step"], row["detail"]) for row in map(json.loads, self.events.read_text().splitlines())]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_left_out_and_told(value, tmp_path, capfd):
    run = Run(tmp_path)
    assert [run.step(), run.step(loss=value), run.step(norm=value), run.step()] == [True, False, False, True]
    assert run.told() == [(2, "its loss is NaN or infinite"), (3, "its gradient norm is NaN or infinite")]
    assert "probe  step 2 is left out: its loss is NaN or infinite" in capfd.readouterr().err


def test_too_many_in_a_row_end_the_run(tmp_path):
    run = Run(tmp_path, most=2)
    for _ in range(3):  # good ones between them start the count anew
        assert [run.step(math.nan), run.step(math.nan), run.step()] == [False, False, True]
    run.step(math.nan)
    run.step(math.nan)
    with pytest.raises(UserError, match=r"step 12 of the run in .*: its loss is NaN.* as in the 2 steps before"):
        run.step(math.nan)


def test_a_spike_is_measured_by_the_median_of_what_was_taken(tmp_path):
    run = Run(tmp_path, most=9, spike_factor=3)
    assert run.step(loss=100.0)  # there is nothing to compare it with yet
    for _ in range(LEAST - 1):
        run.step()
    assert run.step(loss=5.9, norm=2.9)
    assert not run.step(loss=6.1)
    assert not run.step(norm=3.1)
    assert [detail for _, detail in run.told()] == [
        f"its loss is 6.1, 3.05 times the median of the last {LEAST + 1}",
        f"its gradient norm is 3.1, 3.10 times the median of the last {LEAST + 1}",
    ]
    for _ in range(WINDOW):
        run.step(loss=6.0 - 0.05)
    assert run.step(loss=9.0)  # what is usual has changed


def test_a_resumed_run_decides_as_one_that_went_on(tmp_path):
    first = Run(tmp_path, most=1, spike_factor=2)
    for loss in [1.0] * LEAST + [math.nan]:
        first.step(loss)
    second = Run(tmp_path, most=1, spike_factor=2)
    second.guard.load_state_dict(json.loads(json.dumps(first.guard.state_dict())))
    with pytest.raises(UserError):
        second.step(loss=2.1)


def test_an_update_that_is_left_out_changes_neither_weights_nor_state():
    from megatron.core.optimizer import OptimizerConfig

    from nemo_bluelm.runtime.optimizer import _Chained

    weight = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.AdamW([weight], lr=0.1)

    class Inner:
        """As much of a Megatron-Core optimizer as a step needs."""

        config = OptimizerConfig(optimizer="adam", lr=0.1, clip_grad=1.0)
        model_chunks = ()

        def __init__(self):
            self.optimizer = adam

        prepare_grads = lambda self: False  # noqa: E731
        get_parameters = lambda self: [weight]  # noqa: E731
        get_main_grads_for_grad_norm = lambda self: [weight.grad]  # noqa: E731
        get_grad_stats_parallel_group = lambda self: torch.distributed.group.WORLD  # noqa: E731
        init_state_fn = lambda self, optimizer, config: None  # noqa: E731
        is_stub_optimizer = False

        def step_with_ready_grads(self):
            adam.step()
            return True

    chained = _Chained([Inner()])
    chained.takes = lambda loss, norm: bool(norm < 100)
    chained.loss = torch.tensor(1.0)
    for grad, taken in ((1.0, True), (1e3, False), (1.0, True)):
        weight.grad = torch.full((3,), grad)
        before = weight.detach().clone(), {key: value.clone() for key, value in adam.state[weight].items()}
        updated, norm, _ = chained.step()
        assert updated is taken and norm.item() == pytest.approx(grad * 3**0.5)
        same = torch.equal(weight, before[0]) and all(
            torch.equal(value, before[1].get(key, torch.tensor(-1.0))) for key, value in adam.state[weight].items()
        )
        assert same is not taken
