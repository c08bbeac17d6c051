"""What a run trains on, and by what loss: everything else is the same for every objective."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Optional

from nemo_bluelm.config.schema import Recipe
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.train.guards import control_token_notice, text_share_notice

if TYPE_CHECKING:
    import lightning.pytorch as L
    from nemo import lightning as nl

    from nemo_bluelm.runtime.plugin import BlueLM


class Job(ABC):
    """One objective's part of a run. Making it opens the data; nothing heavy is imported before :meth:`module`.

    Args:
        recipe: a checked one.

    Attributes:
        tokenizer: of the data.
        sees_images: whether a sample can have one.

    Raises:
        UserError: data, tokenizer or teacher can't be used.
    """

    tokenizer: Tokenizer
    sees_images: bool

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def notices(self) -> Iterator[Optional[str]]:
        """What the user should know before it starts, a line each; None is nothing."""
        yield control_token_notice(self.recipe)

    @property
    @abstractmethod
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, by which a warm-up in tokens counts."""

    @abstractmethod
    def module(self, optimizer: "nl.MegatronOptimizerModule") -> "BlueLM":
        """The model with its loss."""

    @abstractmethod
    def data_module(self) -> "L.LightningDataModule":
        """Has ``tokens_by_source()`` and ``bad_samples``, which the metrics read."""

    def callbacks(self, checkpoints: Any) -> "list[L.Callback]":
        """Callbacks of its own; ``checkpoints`` is the run's."""
        return []

    def close(self) -> None:  # noqa: B027 (most have nothing to end)
        """End what it started."""

    def ended_early(self, steps: int) -> str:
        """Why the run ended after ``steps`` steps, before its last one, and the way out."""
        raise AssertionError(f"the run ended after {steps} of {self.recipe.train.steps} steps")


class NextToken(Job):
    """The next token of documents, perhaps with a teacher's help.

    Args:
        loader: of the packs; None opens the recipe's data.
    """

    def __init__(self, recipe: Recipe, loader: Any = None):
        super().__init__(recipe)
        if loader is None:
            from nemo_bluelm.train.packs import open_packs
            from nemo_bluelm.train.teachers import check_teacher

            loader = open_packs(recipe)
            if recipe.distill.teacher is not None:
                check_teacher(recipe, loader.tokenizer.content)
        self.loader, self.tokenizer = loader, loader.tokenizer

    @property
    def sees_images(self) -> bool:
        return self.loader.plan.text_share() < 1

    def notices(self) -> Iterator[Optional[str]]:
        yield from super().notices()
        yield text_share_notice(self.recipe, self.loader.plan.text_share())
        for table in self.loader.plan.tables:
            yield table.unused()

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.train.global_batch_size * self.recipe.data.sequence_length

    def module(self, optimizer: "nl.MegatronOptimizerModule") -> "BlueLM":
        from nemo_bluelm.train.distill import module_class
        from nemo_bluelm.train.losses import TokenLoss

        # NeMo builds the module of every further virtual stage anew, from what this one is built from.
        loss = partial(TokenLoss, tuple(table.name for table in self.loader.plan.tables))
        return module_class(self.recipe)(self.recipe, self.tokenizer.image, loss, optimizer)

    def data_module(self) -> "L.LightningDataModule":
        from nemo_bluelm.runtime.data import PackDataModule

        train, decode = self.recipe.train, self.recipe.data.decode
        sizes = train.global_batch_size, train.micro_batch_size
        return PackDataModule(self.loader, *sizes, decode.threads, decode.prefetch)

    def ended_early(self, steps: int) -> str:
        return (
            f"the data ends after {steps} of {self.recipe.train.steps} steps, which are saved in "
            f"{self.recipe.run_dir}: every source has been gone through data.sources.NAME.max_epochs times; raise it "
            f"in a new run_dir, or set train.steps={steps}"
        )
