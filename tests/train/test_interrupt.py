"""A signal ends the run one step after the ranks have told each other of it."""

import os
import signal
from types import SimpleNamespace

import pytest

from nemo_bluelm.runtime.environment import prepare

prepare()  # before anything imports Megatron-Core

import torch  # noqa: E402

from nemo_bluelm.runtime.single import single_process_world  # noqa: E402
from nemo_bluelm.train.interrupt import StopOnSignal  # noqa: E402

MODULE = SimpleNamespace(device=torch.device("cpu"))


class Run:
    def __init__(self):
        self.saved = []
        self.trainer = SimpleNamespace(should_stop=False, step=0, is_global_zero=True)
        self.stop = StopOnSignal(SimpleNamespace(save=lambda trainer: self.saved.append(trainer.step)))
        self.stop.on_train_start(self.trainer)

    def step(self):
        self.trainer.step += 1
        self.stop.on_train_batch_end(self.trainer, MODULE)


@pytest.fixture
def run():
    before = signal.getsignal(signal.SIGTERM)
    with single_process_world():
        run = Run()
        yield run
        run.stop.on_train_end()
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_signal(run):
    for _ in range(3):
        run.step()
    assert not run.trainer.should_stop and run.saved == [] and run.stop.received == 0


def test_saved_once_the_answer_is_in(run, capfd):
    run.step()
    os.kill(os.getpid(), signal.SIGTERM)
    assert "SIGTERM: the run ends after this step" in capfd.readouterr().err
    run.step()
    assert not run.trainer.should_stop
    run.step()
    assert run.trainer.should_stop and run.saved == [3] and run.stop.received == signal.SIGTERM


def test_a_signal_in_the_last_step_counts_on_all_ranks_or_none(run):
    os.kill(os.getpid(), signal.SIGTERM)
    run.step()
    run.stop.on_train_end()
    assert run.stop.received == signal.SIGTERM  # asked of all, so all know


def test_a_signal_after_the_last_question_is_too_late(run):
    run.step()
    os.kill(os.getpid(), signal.SIGTERM)
    run.stop.on_train_end()
    assert run.stop.received == 0  # this rank may be the only one that knows
