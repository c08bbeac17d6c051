"""The pairs of a reward model's run as a Lightning data module: an optimizer step at a time, the next one meanwhile."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple, Optional

import lightning.pytorch as L
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MegatronStep
from torch.utils.data import DataLoader, IterableDataset

from nemo_bluelm.config.schema import Oversize, Recipe, geometry_of
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.rl.preferences import Encoder, Pair, PreferenceDataset, ScoredBatch, pack_pairs
from nemo_bluelm.runtime.data import PackSampler, PackStep

_JUDGED_FROM = 100  # pairs read before data.max_bad_fraction applies: of a handful, one is already a large part


class _Step(NamedTuple):
    """Pairs of this rank in a step, and what the dataset's state is after it."""

    pairs: list["Future[Pair | UserError]"]
    state: dict[str, int]


class PairSampler(PackSampler):
    """Tells Megatron's schedule how many packs this rank has in the step that begins."""

    def __init__(self, data: "PairDataModule", sequence_length: int):
        super().__init__(global_batch_size=1, micro_batch_size=1, sequence_length=sequence_length)
        self._data = data

    def on_megatron_step_start(self, step: MegatronStep) -> PackStep:
        return replace(super().on_megatron_step_start(step), num_microbatches=self._data.begin_step())


class _Packs(IterableDataset):
    """The packs of the step at hand, one after another, without end."""

    def __init__(self, data: "PairDataModule"):
        self._data = data

    def __iter__(self) -> Iterator[ScoredBatch]:
        while True:
            yield from self._data.packs


class PairDataModule(L.LightningDataModule):
    """Every data-parallel rank draws all pairs of a step and encodes its share of them.

    A pair that can't be read, or is longer than a pack, is left out of its step and counted in ``bad_samples``.

    Args:
        dataset: stands at the first pair of the next step.

    Attributes:
        packs: of this rank in the step at hand.
    """

    def __init__(self, recipe: Recipe, dataset: PreferenceDataset, tokenizer: Tokenizer):
        super().__init__()
        self._recipe, self._dataset, self._pad = recipe, dataset, tokenizer.pad
        self._encoder = Encoder(tokenizer, geometry_of(recipe.model), recipe.data.chat.control_token)
        self._threads = ThreadPoolExecutor(max(1, recipe.data.decode.threads))
        self._coming: Optional[_Step] = None
        self._state = dataset.state()
        self.packs: list[ScoredBatch] = []
        self.samples = self.bad_samples = 0
        self._last: Optional[UserError] = None
        self.data_sampler = PairSampler(self, recipe.data.sequence_length)

    def begin_step(self) -> int:
        """Have the next step's packs ready; how many they are on this rank.

        Raises:
            UserError: more bad pairs than ``data.max_bad_fraction``.
        """
        step = self._coming or self._draw()
        pairs = self._good([future.result() for future in step.pairs])
        data = self._recipe.data
        limits = data.sequence_length, data.max_tiles, data.max_documents, self._pad
        self.packs = pack_pairs(pairs, *limits, geometry_of(self._recipe.model).tile)
        self._state, self._coming = step.state, self._draw()
        return len(self.packs)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(_Packs(self), batch_size=None, num_workers=0)

    def tokens_by_source(self) -> dict[str, int]:
        """Pairs drawn so far by source; a pair's tokens are twice its prompt's and those of two answers."""
        return self._state

    def state_dict(self) -> dict[str, Any]:
        return {"pairs": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._dataset.restore(state["pairs"])
        self._state, self._coming = self._dataset.state(), None

    def teardown(self, stage: str) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _draw(self) -> _Step:
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        tasks = [self._dataset.draw() for _ in range(self._recipe.train.global_batch_size)]
        return _Step([self._threads.submit(self._pair, task) for task in tasks[rank::ranks]], self._dataset.state())

    def _pair(self, task) -> Pair | UserError:
        try:
            pair = self._encoder.pair(task)
        except UserError as error:
            return UserError(f"{task.source}: {error}")
        longest = self._recipe.data.sequence_length
        if pair.length <= longest:
            return pair
        problem = UserError(f"{task.source}: a pair has {pair.length} tokens, data.sequence_length is {longest}")
        if self._recipe.data.oversize == Oversize.error:
            raise problem
        return problem

    def _good(self, found: list[Pair | UserError]) -> list[Pair]:
        bad = [one for one in found if isinstance(one, UserError)]
        self.samples, self.bad_samples = self.samples + len(found), self.bad_samples + len(bad)
        self._last, data = bad[-1] if bad else self._last, self._recipe.data
        if self.samples >= _JUDGED_FROM and self.bad_samples > data.max_bad_fraction * self.samples:
            raise UserError(
                f"{self.bad_samples} of {self.samples} pairs can't be used, more than data.max_bad_fraction "
                f"{data.max_bad_fraction}; the last one: {self._last}; mend the shards, or raise it"
            )
        return [one for one in found if not isinstance(one, UserError)]
