"""Rewards and environments by name: those of this package, of decorators, and of installed packages' entry points."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.scorers import SCORERS, Score, Scorer, make_scorer
from nemo_bluelm.rl.environments.base import Episode, RewardFunction, ScorerReward

Entry = TypeVar("Entry", bound=Callable)


class Registry:
    """
    Args:
        group: of entry points; its last word is what messages call an entry.
        known: entries by their names.
    """

    def __init__(self, group: str, known: Mapping[str, Callable] = ()):
        self._group, self._entries = group, dict(known)

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Decorator: gives a class or function its name."""

        def put(entry: Entry) -> Entry:
            taken = self._entries.get(name)
            if taken is not None and (taken.__module__, taken.__qualname__) != (entry.__module__, entry.__qualname__):
                raise UserError(f"{self._group}: {name} is {taken.__module__}.{taken.__qualname__} already; rename one")
            if inspect.isclass(entry):
                entry.name = name
            self._entries[name] = entry
            return entry

        return put

    def find(self, name: str, where: str) -> Any:
        """
        Raises:
            UserError: naming ``where``; there is none of this name, or its package can't be imported.
        """
        if name not in self._entries:
            points = {point.name: point for point in entry_points(group=self._group)}
            if name not in points:
                names = sorted({*self._entries, *points})
                close = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
                raise UserError(f"{where}: no {self._group} entry {name}; {hint} Or list its module in imports")
            try:
                self.register(name)(points[name].load())
            except (ImportError, AttributeError) as error:
                raise UserError(f"{where}: {name} can't be imported from {points[name].value}: {error}") from error
        return self._entries[name]


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
