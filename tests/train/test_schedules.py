"""The learning rate at the points that matter, against values computed by hand."""

import pytest

from nemo_bluelm.config.optim import DecayShape, OptimConfig, Schedule
from nemo_bluelm.runtime.environment import prepare

prepare()

from nemo_bluelm.train.schedules import lr_at  # noqa: E402

COSINE = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10, schedule=Schedule.cosine)
CONSTANT = OptimConfig(lr=1.0, warmup_steps=4, schedule=Schedule.constant)
WSD = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=10, schedule=Schedule.wsd, decay_steps=50)
LINEAR = OptimConfig(lr=1.0, schedule=Schedule.wsd, decay_steps=50, decay_shape=DecayShape.linear)
HALF_COSINE = OptimConfig(lr=1.0, schedule=Schedule.wsd, decay_steps=50, decay_shape=DecayShape.cosine)
ONLY_DECAY = OptimConfig(lr=1.0, schedule=Schedule.wsd, decay_steps=110)
NO_STABLE = OptimConfig(lr=1.0, warmup_steps=60, schedule=Schedule.wsd, decay_steps=50)
TWO_STAGE = OptimConfig(lr=1.0, warmup_steps=2, schedule=Schedule.two_stage, second_lr=0.3, second_stage_from=0.7)
TOKENS = OptimConfig(lr=1.0, warmup_tokens=4001, schedule=Schedule.constant)


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
        (WSD, 4, 0.5),
        (WSD, 10, 1.0),
        (WSD, 59, 1.0),  # the last stable step
        (WSD, 60, 1.0),  # a decay starts where the stable phase ends
        (WSD, 62, 0.84),  # 1 - sqrt(2/50) = 0.8 of what is above the minimum
        (WSD, 78, 0.52),  # 1 - sqrt(18/50) = 0.4
        (WSD, 92, 0.36),  # 1 - sqrt(32/50) = 0.2
        (WSD, 109, 0.2080404),  # 1 - sqrt(49/50) = 0.0100505
        (WSD, 110, 0.2),
        (WSD, 1000, 0.2),
        (LINEAR, 60, 1.0),
        (LINEAR, 70, 0.8),
        (LINEAR, 109, 0.02),
        (HALF_COSINE, 85, 0.5),
        (HALF_COSINE, 60, 1.0),
        (ONLY_DECAY, 0, 1.0),
        (ONLY_DECAY, 55, 0.2928932),  # 1 - sqrt(1/2)
        (NO_STABLE, 59, 1.0),
        (NO_STABLE, 62, 0.8),
        (TWO_STAGE, 0, 0.5),
        (TWO_STAGE, 76, 1.0),
        (TWO_STAGE, 77, 0.3),  # 0.7 * 110
        (TWO_STAGE, 109, 0.3),
        (TOKENS, 0, 0.2),  # 4001 tokens are begun in the fifth step of 1000
        (TOKENS, 3, 0.8),
        (TOKENS, 4, 1.0),
        (TOKENS, 5, 1.0),
    ],
)
def test_lr_at(optim, step, expected):
    assert lr_at(step, 110, optim, tokens_per_step=1000) == pytest.approx(expected, abs=1e-7)


def test_no_warm_up_starts_at_the_peak():
    assert lr_at(0, 10, OptimConfig(lr=2.0), tokens_per_step=1) == 2.0


def test_stages_change_at_the_step_that_the_share_means():
    """0.07 * 100 is a little more than 7 in floating point, 0.29 * 100 a little less than 29."""
    for share, step in ((0.07, 7), (0.29, 29)):
        optim = OptimConfig(lr=1.0, schedule=Schedule.two_stage, second_lr=0.5, second_stage_from=share)
        assert [lr_at(at, 100, optim, 1) for at in (step - 1, step)] == [1.0, 0.5]
