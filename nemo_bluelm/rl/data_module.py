"""Rollouts as a Lightning data module: each GRPO step's replies in the packs of its optimizer steps."""

import json
import os
import pickle
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch import Callback, Trainer
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MegatronStep
from torch.utils.data import DataLoader, IterableDataset

from nemo_bluelm.atomic import write_atomically
from nemo_bluelm.config.checks import alignment
from nemo_bluelm.config.grpo import updates_per_step
from nemo_bluelm.config.schema import Recipe
from nemo_bluelm.errors import UserError
from nemo_bluelm.rl.actor import Actor
from nemo_bluelm.rl.batch import RolloutBatch, arrange, lay
from nemo_bluelm.rl.dataset import AllTaskDataset
from nemo_bluelm.rl.environments.environment import Environments
from nemo_bluelm.rl.loss import kl_penalty
from nemo_bluelm.rl.rollout import Rollout, RolloutGenerator
from nemo_bluelm.rl.shaping import kl_in_reward
from nemo_bluelm.runtime.data import PackSampler, PackStep
from nemo_bluelm.runtime.run_dir import newest, step_of

Update = list[RolloutBatch]  # the packs of one rank in an optimizer step

_FOLDER, _KEPT = "rollouts", 2  # below the run's; of the newest GRPO steps, and what the newest checkpoint needs


class RolloutSampler(PackSampler):
    """Tells Megatron's schedule how many packs the update at hand has."""

    def __init__(self, updates: deque[Update], sequence_length: int):
        super().__init__(global_batch_size=1, micro_batch_size=1, sequence_length=sequence_length)
        self._updates = updates

    def on_megatron_step_start(self, step: MegatronStep) -> PackStep:
        return replace(super().on_megatron_step_start(step), num_microbatches=len(self._updates[0]))


class _Packs(IterableDataset):
    """The packs of the update at hand, one after another, for as long as there are updates."""

    def __init__(self, updates: deque[Update]):
        self._updates = updates

    def __iter__(self) -> Iterator[RolloutBatch]:
        while True:
            yield from self._updates[0]


class RolloutDataModule(L.LightningDataModule):
    """
    Args:
        dataset: of prompts.
        environments: reward replies.
    """

    bad_samples = 0

    def __init__(self, recipe: Recipe, dataset: AllTaskDataset, environments: Environments):
        super().__init__()
        self.recipe, self.dataset, self.environments = recipe, dataset, environments
        self.updates: deque[Update] = deque()  # those to come, the one at hand first
        self.data_sampler = RolloutSampler(self.updates, recipe.data.sequence_length)
        self.tokens = dict.fromkeys(recipe.data.sources, 0)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(_Packs(self.updates), batch_size=None, num_workers=0)

    def tokens_by_source(self) -> dict[str, int]:
        """Prompts drawn so far by source; replies have no source's tokens."""
        return self.dataset.state()

    def state_dict(self) -> dict[str, Any]:
        return {"prompts": self.dataset.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dataset.restore(state["prompts"])


class GRPOTrainer(Callback):
    """Before an optimizer step that finds no replies left, a rollout: the rest of the loop is that of all training.

    Replies of a GRPO step with several updates lie in the run's folder until it is over, so that a run that is ended
    in between goes on with them.

    Args:
        pad: id of the pad token.
        run_dir: the run's folder.
    """

    def __init__(self, recipe: Recipe, pad: int, run_dir: Path):
        self._recipe, self._pad = recipe, pad
        self._folder = run_dir / _FOLDER
        self._updates = updates_per_step(recipe.grpo, recipe.train.global_batch_size)
        self._complaints: set[str] = set()  # tasks that the last step had complaints of

    def on_train_start(self, trainer: Trainer, actor: Actor) -> None:
        self._data: RolloutDataModule = trainer.datamodule
        self.backend = actor.backend(trainer.strategy.megatron_parallel)
        self.rollouts = RolloutGenerator(
            *(self._recipe.grpo, self._data.dataset, self._data.environments),
            *(actor.generator, self._recipe.seed),
        )

    def on_train_batch_start(self, trainer: Trainer, actor: Actor, batch: Any, batch_idx: int) -> None:
        step, done = divmod(trainer.global_step, self._updates)
        if self._data.updates:
            return
        kept = self._folder / _name(step) / f"rank_{torch.distributed.get_rank():05d}.pt"
        if done:
            updates, actor.rollout_figures = self._read(kept)
            self._data.updates.extend(updates[done:])
            return
        rollout = self.rollouts.rollout(self.backend, step)
        updates = self._packed(rollout, actor)  # adds figures
        actor.rollout_figures = rollout.figures
        self._data.updates.extend(updates)
        if self._updates > 1:
            self._write(kept, updates, rollout.figures)
        if trainer.is_global_zero:
            self._show(step, rollout)
            for task, complaint in rollout.complaints.items():
                if task not in self._complaints:
                    print(f"{self._recipe.name}  step {step}  {complaint}", file=sys.stderr, flush=True)
        self._complaints = set(rollout.complaints)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._data.updates.popleft()

    def _packed(self, rollout: Rollout, actor: Actor) -> list[Update]:
        """The packs of each update, with what the training graph said before the first of them, and advantages."""
        data, train, keys = self._recipe.data, self._recipe.train, self._recipe.grpo
        length, multiple = data.sequence_length, alignment(self._recipe)
        share = train.global_batch_size // parallel_state.get_data_parallel_world_size()
        samples = self.rollouts.samples(rollout.rewarded)
        updates: list[list[tuple[list[int], RolloutBatch]]] = []  # packs, and whose replies they have
        seconds = {"timing/logprob": 0.0, "timing/ref_logprob": 0.0}
        actor.module.eval()
        for start in range(0, len(samples), share):
            places = arrange(samples[start : start + share], length, data.max_tiles, data.max_documents, multiple)
            places = [[start + place for place in some] for some in places]
            packs = [lay([samples[place] for place in some], length, multiple, self._pad) for some in places]
            begun = time.perf_counter()
            if self._updates > 1 or keys.loss.kl_in_reward:
                packs = [replace(one, old_logp=actor.get_inference_log_probs(one)) for one in packs]
            known = time.perf_counter()
            if keys.loss.reference_policy_kl_penalty:
                packs = [replace(one, ref_logp=actor.get_init_policy_logprobs(one)) for one in packs]
            seconds["timing/logprob"] += known - begun
            seconds["timing/ref_logprob"] += time.perf_counter() - known
            updates.append(list(zip(places, packs)))
        actor.module.train()
        bonuses = self._less_divergence(updates, len(samples)) if keys.loss.kl_in_reward else None
        advantages, figures = self.rollouts.advantages(rollout.rewarded, bonuses)
        rollout.figures.update(figures | seconds)
        packed = [
            [one.with_advantages([advantages[place] for place in places]) for places, one in update]
            for update in updates
        ]
        return packed * keys.num_iterations

    def _less_divergence(self, updates: list[list[tuple[list[int], RolloutBatch]]], count: int) -> list[float]:
        """What each reply's reward loses for its distance from the reference."""
        keys, bonuses = self._recipe.grpo.loss, [0.0] * count
        for places, one in (pack for update in updates for pack in update):
            divergence = kl_penalty(one.old_logp[0], one.ref_logp[0], keys.reference_policy_kl_type.value)
            found = kl_in_reward(
                *(torch.zeros(len(places), dtype=torch.float64), divergence),
                *(one.loss_mask[0], one.segments(), keys.reference_policy_kl_penalty),
            )
            for place, value in zip(places, found.tolist(), strict=True):
                bonuses[place] = value
        return bonuses

    def _write(self, path: Path, updates: list[Update], figures: dict[str, float]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        torch.save((updates[: len(updates) // self._recipe.grpo.num_iterations], figures), partial)
        os.replace(partial, path)
        if torch.distributed.get_rank() == 0:
            checkpoint = newest(self._folder.parent)
            needed = _name(step_of(checkpoint) // self._updates) if checkpoint else ""
            for old in sorted(self._folder.glob("step_*"))[:-_KEPT]:
                if old.name != needed:
                    shutil.rmtree(old, ignore_errors=True)

    def _read(self, path: Path) -> tuple[list[Update], dict[str, float]]:
        try:
            updates, figures = torch.load(path, weights_only=False)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{path}, the replies that the checkpoint goes on with, can't be read ({error}); go on with the "
                "processes that the run had, or from a checkpoint between two GRPO steps"
            ) from error
        return updates * self._recipe.grpo.num_iterations, figures

    def _show(self, step: int, rollout: Rollout) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({"step": step, **one}, ensure_ascii=False) + "\n" for one in rollout.shown)
        write_atomically(self._folder / f"shown_{step:08d}.jsonl", lines.encode())


def _name(step: int) -> str:
    return f"step_{step:08d}"
