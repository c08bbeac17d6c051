"""The rewards of one environment made one: what is scored, what is not, and what it all comes to."""

import math
import time
from collections.abc import Mapping
from typing import Optional

from nemo_bluelm.config.rewards import EnvironmentConfig, RewardEntry, Truncated, reward_entries
from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.scorers.base import Score
from nemo_bluelm.rl.environments.base import Episode, Reward
from nemo_bluelm.rl.environments.registry import make_reward


class Composition:
    """
    Args:
        name: of the environment, for messages.

    Raises:
        UserError: what is wrong with the configuration.
    """

    def __init__(self, config: EnvironmentConfig, name: str):
        where = f"environment {name}"
        self._config = config
        self._entries = reward_entries(config, where)
        self._made = {
            key: make_reward(entry.reward, entry.options, f"{where}: reward {key}")
            for key, entry in self._entries.items()
        }
        self._heaviest = max(self._entries, key=lambda key: self._entries[key].weight)
        longest = sum(made.longest() for made in self._made.values())
        if longest >= config.timeout:
            raise UserError(
                f"{where}: timeout is {config.timeout:g} s, but the limits of its rewards allow {longest:g} s; "
                f"set timeout above that, or lower theirs"
            )

    @property
    def modules(self) -> list[str]:
        """What a process imports to know the rewards."""
        return sorted({made.module for made in self._made.values()})

    @property
    def reads_prompts(self) -> bool:
        """Whether one of the rewards is given prompts."""
        return any(made.reads_prompts for made in self._made.values())

    @property
    def weights(self) -> dict[str, float]:
        """Of the rewards, by their names."""
        return {name: entry.weight for name, entry in self._entries.items()}

    def open(self) -> None:
        for made in self._made.values():
            made.open()

    def close(self) -> None:
        for made in self._made.values():
            made.close()

    def unscored(self, reason: str, **flags: bool) -> Reward:
        """For a reply that nobody can score."""
        return Reward(None, dict.fromkeys(self._entries), reason, **flags)

    def reward(self, episode: Episode) -> Reward:
        """The reward of a reply. An exception in one of the rewards leaves the reply unscored and is named."""
        if episode.truncated and self._config.truncated is Truncated.mask:
            return self.unscored("cut at its length", truncated=True, masked=True)
        low, high = self._config.reward_range
        if episode.truncated and self._config.truncated is Truncated.minimum:
            return Reward(low, dict.fromkeys(self._entries, 0.0), "cut at its length", False, truncated=True)
        begun = time.monotonic()
        components: dict[str, Optional[float]] = {}
        reasons: list[str] = []
        timed_out = failed = False
        for name, made in self._made.items():
            try:
                score = made.score(episode)
                score = score if isinstance(score, Score) else Score(None, f"it returned {score!r:.60}, not a score")
            except Exception as error:
                failed, score = True, Score(None, f"{type(error).__name__}: {error}"[:300])
            components[name], wrong = _mapped(score.value, self._entries[name])
            timed_out = timed_out or score.timed_out
            if wrong or score.reason:
                reasons.append(f"{name}: {wrong or score.reason}")
        best = components[self._heaviest]
        total = self._total(components)
        return Reward(
            None if total is None else low + (high - low) * total,
            components,
            "; ".join(reasons),
            None if best is None else best >= self._config.correct_from,
            timed_out,
            failed,
            episode.truncated,
            seconds=time.monotonic() - begun,
        )

    def _total(self, components: Mapping[str, Optional[float]]) -> Optional[float]:
        """The weighted mean; None if a reward that has a weight has no value."""
        weighted = {name: entry.weight for name, entry in self._entries.items() if entry.weight > 0}
        if any(components[name] is None for name in weighted):
            return None
        total = sum(weight * components[name] for name, weight in weighted.items()) / sum(weighted.values())
        return min(1.0, max(0.0, total))  # the division rounds


def _mapped(value: object, entry: RewardEntry) -> tuple[Optional[float], str]:
    """A raw value from its declared range to [0, 1], or why it can't be."""
    if value is None:
        return None, ""
    low, high = entry.range
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)  # NumPy's and torch's numbers too
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:
        return None, f"its value {value!r:.40} is not in the range [{low:g}, {high:g}] that it is declared to have"
    return (number - low) / (high - low), ""
