"""Environments: how the replies of a task are rewarded. Which rewards there are is known to ``rl.environments``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Dict, List, Tuple

from omegaconf import MISSING

from nemo_bluelm.errors import UserError


class Truncated(Enum):
    """What becomes of a reply that reached its length before its answer ended."""

    minimum = "minimum"  # the least reward there is
    mask = "mask"  # no reward, and no part of its group's baseline
    score = "score"  # as any other


@dataclass
class EnvironmentConfig:
    """Rewards of one task; a record's ``task_name`` names it.

    ``rewards`` maps names to options: ``weight`` (1), ``range``, the values that the reward is declared to have
    ([0, 1]), ``reward``, which one it is (the name), and the options of that reward. What it gives is the weighted mean
    of them, each mapped from its range to [0, 1], mapped to ``reward_range``.
    """

    type: str = "rewards"  # a registered environment
    reward_range: List[float] = field(default_factory=lambda: [0.0, 1.0])
    num_workers: int = 2  # processes that score replies
    timeout: float = 20.0  # seconds for all rewards of a reply; then its process is killed and the reply unscorable
    truncated: Truncated = Truncated.minimum
    correct_from: float = 0.5  # from this value of the heaviest reward on a reply counts as right, in accuracy
    imports: List[str] = field(default_factory=list)  # modules that register rewards of your own
    rewards: Dict[str, Any] = MISSING


@dataclass(frozen=True)
class RewardEntry:
    """One of an environment's ``rewards``; ``options`` are those of the reward itself."""

    reward: str
    weight: float
    range: Tuple[float, float]
    options: Dict[str, Any]


def reward_entries(config: EnvironmentConfig, where: str) -> Dict[str, RewardEntry]:
    """The rewards of an environment, and a check of all its keys but the rewards' own.

    Raises:
        UserError: naming ``where`` and the key.
    """
    _range(config.reward_range, f"{where}: reward_range")
    if config.num_workers < 1:
        raise UserError(f"{where}: num_workers is {config.num_workers}; it must be 1 or more")
    if not 0 < config.timeout < math.inf:
        raise UserError(f"{where}: timeout is {config.timeout}; it must be greater than 0 seconds")
    if not 0 < config.correct_from <= 1:
        raise UserError(f"{where}: correct_from is {config.correct_from}; it must be greater than 0 and at most 1")
    if not config.rewards:
        raise UserError(f"{where}: rewards is empty; name one at least, such as 'math: {{weight: 1.0}}'")
    entries = {name: _entry(name, given, f"{where}: reward {name}") for name, given in config.rewards.items()}
    if not sum(entry.weight for entry in entries.values()) > 0:
        raise UserError(f"{where}: the weights of its rewards are all 0; give one of them a weight")
    return entries


def _entry(name: str, given: Any, where: str) -> RewardEntry:
    if given is not None and not isinstance(given, Mapping):
        raise UserError(f"{where}: it is a mapping such as {{weight: 1.0}}, this is {given!r}")
    options = dict(given or {})
    weight, kind = options.pop("weight", 1.0), options.pop("reward", name)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise UserError(f"{where}: weight is {weight!r}; it must be 0 or more")
    low, high = _range(options.pop("range", (0.0, 1.0)), f"{where}: range")
    return RewardEntry(str(kind), float(weight), (low, high), options)


def _range(given: Any, where: str) -> Tuple[float, float]:
    try:
        low, high = (float(bound) for bound in given)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{where} is {given}; it must be two numbers, the least value and the greatest, such as [0, 1]")
    return low, high
