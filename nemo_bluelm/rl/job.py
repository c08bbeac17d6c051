"""GRPO as a run's objective."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from nemo_bluelm.config.grpo import updates_per_step
from nemo_bluelm.config.schema import Recipe, SourceConfig
from nemo_bluelm.data.files import Files
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.rl.dataset import AllTaskDataset, Curriculum, Task
from nemo_bluelm.rl.environments.environment import Environments
from nemo_bluelm.runtime.environment import Launch
from nemo_bluelm.runtime.run_dir import resolve_checkpoint
from nemo_bluelm.train.job import Job
from nemo_bluelm.train.packs import check_vocabulary

if TYPE_CHECKING:
    import lightning.pytorch as L
    from nemo import lightning as nl

    from nemo_bluelm.runtime.plugin import BlueLM


class GRPO(Job):
    """Group relative policy optimisation (arXiv 2402.03300) with rewards of several kinds.

    Raises:
        UserError: no such prompts, a task without environment, an environment that can't be.
    """

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        _check_ranks(recipe)
        self.tokenizer = Tokenizer.load(Files(recipe.data.root).absolute(recipe.data.tokenizer))
        check_vocabulary(recipe, self.tokenizer)
        self._dataset = AllTaskDataset(recipe.data, recipe.seed, curriculum=_curriculum(recipe))
        self._held_out = _held_out(recipe)
        self._environments = Environments(recipe.environments)
        self._environments.check(self._dataset.task_names | {task.task_name for task in self._held_out})

    @property
    def sees_images(self) -> bool:
        return self._dataset.sees_images

    def notices(self) -> Iterator[Optional[str]]:
        yield from super().notices()
        unused = set(self.recipe.environments) - self._dataset.task_names
        if unused:
            yield f"environments {', '.join(sorted(unused))} have no prompts in data.sources"

    @property
    def tokens_per_step(self) -> int:
        """At most: replies differ in length."""
        return self.recipe.train.global_batch_size * self.recipe.data.sequence_length

    def module(self, optimizer: "nl.MegatronOptimizerModule") -> "BlueLM":
        from nemo_bluelm.rl.actor import Actor

        reference = None
        if self.recipe.grpo.loss.reference_policy_kl_penalty:
            reference = resolve_checkpoint(self.recipe.init_from, "init_from")
        return Actor(self.recipe, self.tokenizer, reference, optimizer)

    def data_module(self) -> "L.LightningDataModule":
        from nemo_bluelm.rl.data_module import RolloutDataModule

        return RolloutDataModule(self.recipe, self._dataset, self._environments)

    def callbacks(self, checkpoints: Any) -> "list[L.Callback]":
        from nemo_bluelm.rl.data_module import GRPOTrainer

        run_dir = Path(self.recipe.run_dir).absolute()
        trainer = GRPOTrainer(self.recipe, self.tokenizer.pad, run_dir)
        if not self._held_out:
            return [trainer]
        from nemo_bluelm.rl.validation import Validation

        return [Validation(self.recipe, self._held_out, run_dir, checkpoints), trainer]

    def close(self) -> None:
        self._environments.close()


def _check_ranks(recipe: Recipe) -> None:
    ranks = Launch.from_environment().world_size // recipe.parallel.tensor
    prompts = recipe.grpo.num_prompts_per_step
    if prompts % ranks:
        raise UserError(
            f"grpo.num_prompts_per_step is {prompts}, not a multiple of the {ranks} data-parallel ranks; set it to "
            f"{-(-prompts // ranks) * ranks}"
        )


def _curriculum(recipe: Recipe) -> Optional[Curriculum]:
    keys = recipe.grpo.curriculum
    if keys.field is None:
        return None
    steps = recipe.train.steps // updates_per_step(recipe.grpo, recipe.train.global_batch_size)
    return Curriculum(keys.field, keys.start, (keys.steps or -(-steps // 2)) * recipe.grpo.num_prompts_per_step)


def _held_out(recipe: Recipe) -> list[Task]:
    keys = recipe.grpo.validation
    if not keys.sources:
        return []
    sources = {name: SourceConfig(shards=list(shards)) for name, shards in keys.sources.items()}
    held_out = AllTaskDataset(replace(recipe.data, sources=sources), recipe.seed, "grpo.validation.sources")
    return held_out.first(keys.max_samples)
