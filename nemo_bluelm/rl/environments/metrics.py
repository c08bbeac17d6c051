"""What is told of rewards: per task, per component and over all."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, pstdev

from nemo_bluelm.rl.environments.base import Reward


def task_metrics(task: str, rewards: Sequence[Reward]) -> dict[str, float]:
    """Of one task's replies, those of all ranks. Mean, spread and accuracy are of the replies that have a reward, and
    left out where none has; rates are shares of all replies. The unscorable ones have no reward; those that are masked
    because they were cut at their length don't count."""
    if not rewards:
        return {}
    found = {
        f"env/{task}/latency": fmean(reward.seconds for reward in rewards),
        f"env/{task}/timeout_rate": fmean(reward.timed_out for reward in rewards),
        f"env/{task}/error_rate": fmean(reward.failed for reward in rewards),
        f"env/{task}/truncation_rate": fmean(reward.truncated for reward in rewards),
        f"env/{task}/unscorable_rate": fmean(reward.value is None and not reward.masked for reward in rewards),
    }
    values = [reward.value for reward in rewards if reward.value is not None]
    found |= {f"reward/{task}/{name}": value for name, value in _spread(values).items()}
    right = [reward.correct for reward in rewards if reward.correct is not None]
    if right:
        found[f"accuracy/{task}"] = fmean(right)
    return found


def overall_metrics(rewards: Sequence[Reward]) -> dict[str, float]:
    """Of the replies of all tasks: their rewards, and each component over the tasks that have it."""
    found = {
        f"reward/{name}": value
        for name, value in _spread([reward.value for reward in rewards if reward.value is not None]).items()
    }
    components: dict[str, list[float]] = defaultdict(list)
    for reward in rewards:
        for name, value in reward.components.items():
            if value is not None:
                components[name].append(value)
    for name, values in components.items():
        spread = _spread(values)
        found |= {f"reward_component/{name}/{key}": spread[key] for key in ("mean", "std")}
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"mean": fmean(values), "std": pstdev(values), "min": min(values), "max": max(values)}
