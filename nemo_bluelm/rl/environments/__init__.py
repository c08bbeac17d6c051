"""Environments of reinforcement learning: the rewards of a task's replies."""

from nemo_bluelm.rl.environments import code, format, gui, reward_model  # noqa: F401  (they register their rewards)
from nemo_bluelm.rl.environments.base import Episode, Reward, RewardFunction, Said
from nemo_bluelm.rl.environments.environment import Environment, Environments
from nemo_bluelm.rl.environments.registry import register_environment, register_reward

__all__ = [
    "Environment",
    "Environments",
    "Episode",
    "Reward",
    "RewardFunction",
    "Said",
    "register_environment",
    "register_reward",
]
