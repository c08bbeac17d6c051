"""Learning a reward model as a run's objective."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.grpo import Objective
from nemo_bluelm.config.schema import Recipe
from nemo_bluelm.data.files import Files
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.rl.preferences import PreferenceDataset
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, resolve_checkpoint
from nemo_bluelm.train.job import Job
from nemo_bluelm.train.packs import check_vocabulary

if TYPE_CHECKING:
    import lightning.pytorch as L
    from nemo import lightning as nl

    from nemo_bluelm.runtime.plugin import BlueLM


class RewardModelling(Job):
    """Which of two answers is preferred (Bradley-Terry); an optimizer step has ``train.global_batch_size`` pairs.

    Raises:
        UserError: no such pairs, or a record that is none.
    """

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.tokenizer = Tokenizer.load(Files(recipe.data.root).absolute(recipe.data.tokenizer))
        check_vocabulary(recipe, self.tokenizer)
        self._dataset = PreferenceDataset(recipe.data, recipe.seed)

    @property
    def sees_images(self) -> bool:
        return self._dataset.sees_images

    def notices(self) -> Iterator[Optional[str]]:
        """None: answers are scored without a control token, and no text share was learnt with."""
        return iter(())

    @property
    def tokens_per_step(self) -> int:
        """At most: answers differ in length."""
        return self.recipe.train.global_batch_size * self.recipe.data.sequence_length

    def module(self, optimizer: "nl.MegatronOptimizerModule") -> "BlueLM":
        from nemo_bluelm.rl.reward_model import RewardModel

        return RewardModel(self.recipe, self.tokenizer, optimizer)

    def data_module(self) -> "L.LightningDataModule":
        from nemo_bluelm.rl.reward_data import PairDataModule

        return PairDataModule(self.recipe, self._dataset, self.tokenizer)


def resolve_reward_model(path: str, key: str) -> Path:
    """The checkpoint of a reward model that a run or checkpoint folder names.

    Args:
        key: what said so, for the message.

    Raises:
        UserError: there is none, or it is of another objective.
    """
    checkpoint = resolve_checkpoint(path, key)
    if load_recipe(str(checkpoint / RECIPE_FILE), []).objective != Objective.reward_model:
        raise UserError(f"{key} {path} is no reward model; train one with objective=reward_model and name its run")
    return checkpoint
