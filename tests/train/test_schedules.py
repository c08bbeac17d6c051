"""The learning rate at the points that matter."""

import pytest

from nemo_bluelm.config.schema import OptimConfig, Schedule
from nemo_bluelm.runtime.environment import prepare

prepare()

from nemo_bluelm.train.schedules import lr_at  # noqa: E402

COSINE = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10, schedule=Schedule.cosine)
CONSTANT = OptimConfig(lr=1.0, warmup_steps=4, schedule=Schedule.constant)


@pytest.mark.parametrize(
    ("optim", "step", "expected"),
    [
        (COSINE, 0, 0.1),  # the first step already moves
        (COSINE, 9, 1.0),
        (COSINE, 10, 1.0),
        (COSINE, 60, 0.55),  # half way between peak and end
        (COSINE, 110, 0.1),
        (COSINE, 1000, 0.1),  # never below the minimum
        (CONSTANT, 1, 0.5),
        (CONSTANT, 109, 1.0),
    ],
)
def test_lr_at(optim, step, expected):
    assert lr_at(step, steps=110, optim=optim) == pytest.approx(expected)


def test_no_warm_up_starts_at_the_peak():
    assert lr_at(0, steps=10, optim=OptimConfig(lr=2.0)) == 2.0
