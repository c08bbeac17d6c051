"""What is written of each step, and when: never behind a checkpoint, never of a step that went wrong."""

import json
from types import SimpleNamespace

import pytest

from nemo_bluelm.runtime.environment import prepare

prepare()  # before anything imports Megatron-Core

import torch  # noqa: E402

from nemo_bluelm.errors import UserError  # noqa: E402
from nemo_bluelm.runtime.single import single_process_world  # noqa: E402
from nemo_bluelm.train import metrics as module_under_test  # noqa: E402
from nemo_bluelm.train.metrics import Metrics  # noqa: E402


class Clock:
    """A ``Stamp`` whose time the test sets."""

    now = 0.0

    def __init__(self, device):
        self.at = Clock.now

    def seconds_until(self, later):
        return later.at - self.at


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setattr(module_under_test, "Stamp", Clock)
    monkeypatch.setattr(Clock, "now", 0.0)
    with single_process_world():
        yield


class Run:
    """Drives the callback as Lightning does."""

    def __init__(self, run_dir, steps=10, step=0, **options):
        self.metrics = Metrics(run_dir, "probe", steps, log_every=1, **options)
        others = {"divergence": torch.tensor(0.5)}
        self.module = SimpleNamespace(
            device=torch.device("cpu"),
            other_losses=lambda: others,
            sources=("text", "photos"),
            loss_by_source=lambda: torch.tensor([1.25, torch.nan]),
        )
        self.trainer = SimpleNamespace(
            is_global_zero=True,
            global_step=step,
            optimizers=[SimpleNamespace(param_groups=[{"lr": 0.125, "pre_lr_mult": 0.25}])],
            datamodule=SimpleNamespace(
                bad_samples=3,
                tokens_by_source=lambda: {"text": 60 * self.trainer.global_step},
            ),
            strategy=SimpleNamespace(grad_norm=torch.tensor(2.0, dtype=torch.float64)),
        )
        self.path = run_dir / "metrics.jsonl"
        self.metrics.on_train_start(self.trainer, self.module)

    def step(self, seconds=1.0, loss=1.5, tokens=100, flops=4e12):
        self.metrics.on_train_batch_start(self.trainer, self.module, None, 0)
        self.module.real_tokens += tokens
        self.module.model_flops += flops
        self.trainer.global_step += 1
        Clock.now += seconds
        self.metrics.on_train_batch_end(self.trainer, self.module, {"loss": torch.tensor(loss)}, None, 0)

    def end(self):
        self.metrics.on_train_end(self.trainer, self.module)
        self.metrics.teardown(self.trainer, self.module, "fit")

    def rows(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def test_a_step_is_reported_after_the_next_and_the_last_at_the_end(world, tmp_path):
    run = Run(tmp_path)
    run.step()
    assert run.rows() == []
    run.step(seconds=2.0, loss=1.25, tokens=50, flops=6e12)
    assert [row["step"] for row in run.rows()] == [1]
    run.end()
    assert run.rows() == [
        {
            **{"step": 1, "loss": 1.5, "lr": 0.5, "grad_norm": 2.0, "tokens": 100, "seconds": 1.0},
            **{
                "loss_by_source": {"text": 1.25},
                "tokens_by_source": {"text": 60},
                "tokens_per_second": 100.0,
                "tflops": 4.0,
                "mfu": None,
                "bad_samples": 3,
                "divergence": 0.5,
            },
        },
        {
            **{"step": 2, "loss": 1.25, "lr": 0.5, "grad_norm": 2.0, "tokens": 50, "seconds": 2.0},
            **{
                "loss_by_source": {"text": 1.25},
                "tokens_by_source": {"text": 120},
                "tokens_per_second": 25.0,
                "tflops": 3.0,
                "mfu": None,
                "bad_samples": 3,
                "divergence": 0.5,
            },
        },
    ]


def test_utilisation_where_the_peak_is_known(world, tmp_path, capfd):
    run = Run(tmp_path)
    run.metrics.peak = 8e12
    run.step(flops=2e12)
    run.end()
    assert run.rows()[0]["mfu"] == 0.25
    assert "2 TFLOP/s  25.0% MFU" in capfd.readouterr().err


def test_what_comes_between_two_steps_is_timed(world, tmp_path):
    run = Run(tmp_path)
    run.step()
    Clock.now += 0.5  # a checkpoint, the loader or another callback
    run.step()
    run.end()
    assert [row["seconds"] for row in run.rows()] == [1.0, 1.5]


def test_a_value_that_is_no_number_is_null_where_steps_may_be_left_out(world, tmp_path):
    run = Run(tmp_path, ends_on_nan=False)
    run.step(loss=float("nan"))
    run.end()
    assert run.rows()[0]["loss"] is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("at", ["step", "end"])
def test_a_step_that_is_not_finite_ends_the_run_before_it_is_saved(value, what, at, world, tmp_path):
    run = Run(tmp_path)
    run.step()
    if what == "loss":
        run.step(loss=value)
    else:
        run.trainer.strategy.grad_norm = torch.tensor(value, dtype=torch.float64)
        run.step()
    with pytest.raises(UserError, match=f"the {what} of the run in .* NaN or infinite in step 2; lower optim.lr"):
        getattr(run, at)()
    assert [row["step"] for row in run.rows()] == [1]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(world, tmp_path):
    run = Run(tmp_path)
    for _ in range(4):
        run.step()
    run.end()
    with run.path.open("a") as file:
        file.write('{"step": 5, "lo')  # killed in the middle of a line
    run = Run(tmp_path, step=2)
    assert [row["step"] for row in run.rows()] == [1, 2]
    run.step()
    run.end()
    assert [row["step"] for row in run.rows()] == [1, 2, 3]
