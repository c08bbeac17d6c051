"""The learned reward: what a Bradley-Terry reward model makes of an answer."""

import math
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.scorers.base import Score
from nemo_bluelm.rl.environments.base import Episode, RewardFunction
from nemo_bluelm.rl.environments.registry import register_reward

if TYPE_CHECKING:
    from nemo_bluelm.rl.reward_model import Judge

_DEVICES = ("auto", "cpu")


@register_reward("reward_model")
@dataclass
class RewardModelReward(RewardFunction):
    """The score of an answer, without its thought, to the prompt with its images.

    Each process of the environment loads the model: ``num_workers: 1`` is enough for most. A score has no bounds. Its
    logistic function lies between 0 and 1; without it, ``range`` must say what values scores have, and a score outside
    is no reward.

    Attributes:
        checkpoint: run or checkpoint folder of a run with ``objective: reward_model``.
        sigmoid: give 1 / (1 + exp(-score)).
        device: ``auto`` is this rank's GPU, where there is one; ``cpu`` never a GPU.
    """

    reads_prompts = True

    checkpoint: Optional[str] = None
    sigmoid: bool = True
    device: str = "auto"

    def __post_init__(self):
        self._judge: Optional["Judge"] = None
        self._opened = ExitStack()

    def check(self) -> None:
        if self.device not in _DEVICES:
            raise UserError(f"device is {self.device!r}; it must be one of {', '.join(_DEVICES)}")
        if not self.checkpoint:
            raise UserError("checkpoint is null; name the run of a reward model")
        self._resolved()

    def open(self) -> None:
        """Loads the model, the first time."""
        if self._judge is not None:
            return
        if self.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything looks for a GPU
        from nemo_bluelm.runtime.environment import Launch, prepare

        prepare()
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(Launch.from_environment().local_rank)
        from nemo_bluelm.rl.reward_model import open_reward_model

        self._judge = self._opened.enter_context(open_reward_model(self._resolved()))

    def score(self, episode: Episode) -> Score:
        self.open()
        if not episode.messages:
            return Score(None, "the episode lacks its prompt")
        try:
            (score,) = self._judge.scores(episode.messages, [episode.answer], episode.images)
        except UserError as error:
            return Score(None, str(error))
        if score is None:
            return Score(None, "the answer is longer than what the reward model was trained on")
        return Score(_logistic(score) if self.sigmoid else score)

    def close(self) -> None:
        self._judge = None
        self._opened.close()

    def _resolved(self) -> Path:
        from nemo_bluelm.rl.reward_job import resolve_reward_model  # it imports torch

        return resolve_reward_model(self.checkpoint, "checkpoint")


def _logistic(score: float) -> float:
    return 1 / (1 + math.exp(-score)) if score > -700 else 0.0
