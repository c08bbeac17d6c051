"""What is told of replies that nobody can judge, in training and in validation."""

import pytest

from nemo_bluelm.rl.environments.base import Reward
from nemo_bluelm.rl.rollout import Told, complaints
from nemo_bluelm.rl.validation import _summary

DOWN = Reward(None, reason="the judge did not answer")
MASKED = Reward(None, reason="cut at its length", masked=True)
RIGHT, WRONG = Reward(1.0, correct=True), Reward(0.0, correct=False)


def told(task: str, *rewards: Reward) -> list[Told]:
    return [Told(0, n, task, reward, 5, None, 0, 5, False, False, True, 0.0) for n, reward in enumerate(rewards)]


def test_a_task_without_rewards_is_complained_of():
    found = complaints(
        told("math", RIGHT, WRONG, DOWN)
        + told("essay", DOWN, DOWN, Reward(None, reason="garbage"), RIGHT)
        + told("long", MASKED, MASKED, RIGHT)
    )
    assert found == {"essay": "essay: 3 of 4 replies have no reward, most for this: the judge did not answer"}


def test_what_nobody_can_judge_is_neither_right_nor_wrong():
    rows = [("math", 1, False, RIGHT), ("math", 2, False, DOWN), ("math", 2, False, WRONG), ("math", 3, False, DOWN)]
    figures = _summary(rows)
    assert figures["val/accuracy"] == figures["val/reward/mean"] == 0.5
    assert figures["val/unscorable_rate"] == 0.5 and figures["val/pass_at_1"] == 0.5


@pytest.mark.parametrize("rows", [[("math", 1, False, DOWN)]])
def test_nothing_is_made_up_where_nobody_judged(rows):
    assert _summary(rows) == {"val/unscorable_rate": 1.0}
