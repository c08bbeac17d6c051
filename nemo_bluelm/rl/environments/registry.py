"""Rewards and environments by name: those of this package, of decorators, and of installed packages' entry points."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.scorers import SCORERS, Score, Scorer, make_scorer
from nemo_bluelm.registry import Registry
from nemo_bluelm.rl.environments.base import Episode, RewardFunction, ScorerReward

REWARDS = Registry("nemo_bluelm.rewards", SCORERS)
ENVIRONMENTS = Registry("nemo_bluelm.environments")
register_reward = REWARDS.register
register_environment = ENVIRONMENTS.register


class FunctionReward(RewardFunction):
    """A plain function of an episode, and of options by name; it returns a number, None, or a ``Score``."""

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]):
        self._function, self._options = function, options

    @property
    def module(self) -> str:
        return self._function.__module__

    def score(self, episode: Episode) -> Score:
        found = self._function(episode, **self._options)
        return found if isinstance(found, Score) else Score(found, "" if found is not None else "it has no value")


def make_reward(name: str, options: Mapping[str, Any], where: str) -> RewardFunction:
    """The reward of a name.

    Raises:
        UserError: naming ``where``; no such reward, or options that it doesn't have.
    """
    kind = REWARDS.find(name, where)
    if inspect.isclass(kind):
        made = make_scorer(kind, dict(options), where)
        return ScorerReward(made) if isinstance(made, Scorer) else made
    try:
        inspect.signature(kind).bind(None, **options)
    except TypeError as error:
        raise UserError(f"{where}: {error}; it takes {inspect.signature(kind)}") from error
    return FunctionReward(kind, options)
