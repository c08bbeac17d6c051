"""What the policy can do on held-out prompts, again and again, and the checkpoint where it could most."""

import json
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Optional

from lightning.pytorch import Callback, Trainer
from megatron.core import parallel_state

from nemo_bluelm.atomic import write_atomically
from nemo_bluelm.config.grpo import updates_per_step
from nemo_bluelm.config.schema import Recipe
from nemo_bluelm.generate.request import Prompt, Reply
from nemo_bluelm.rl.actor import Actor
from nemo_bluelm.rl.dataset import Task
from nemo_bluelm.rl.environments.base import Reward
from nemo_bluelm.rl.environments.environment import Environments
from nemo_bluelm.rl.rollout import first_of_tensor_group, gathered, sampling_of
from nemo_bluelm.runtime.checkpoints import Checkpoints

FILE = "validation.jsonl"
_MOST_UNSCORABLE = 0.1  # of the replies; what the others say may be chance


class Validation(Callback):
    """Every ``grpo.validation.period`` GRPO steps and after the last one, replies to held-out prompts in every mode
    that is trained.

    Replies that nobody can judge count neither as right nor as wrong; ``val/unscorable_rate`` is their share. A line in
    which it is above 0.1 doesn't make its checkpoint the best.

    ``validation.jsonl`` gets a line each time: ``val/accuracy`` and ``val/pass_at_1``, the share of right replies;
    ``val/pass_at_k``, of prompts with a right one among k; ``val/reward/mean``; and per task ``val/TASK/accuracy``. The
    checkpoint with the best ``grpo.validation.metric`` is kept beside the newest ones.

    Args:
        tasks: held-out prompts.
        checkpoints: the run's.
    """

    def __init__(self, recipe: Recipe, tasks: list[Task], run_dir: Path, checkpoints: Checkpoints):
        self._recipe, self._tasks, self._path, self._checkpoints = recipe, tasks, run_dir / FILE, checkpoints
        self._every = recipe.grpo.validation.period * updates_per_step(recipe.grpo, recipe.train.global_batch_size)

    def on_train_start(self, trainer: Trainer, actor: Actor) -> None:
        rows = [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []
        self._rows = [row for row in rows if row["step"] <= trainer.global_step]
        self._protect()
        if not trainer.global_step and self._recipe.grpo.validation.at_start and not self._rows:
            self._validate(trainer, actor)

    def on_train_batch_end(self, trainer: Trainer, actor: Actor, *_: Any) -> None:
        step = trainer.global_step
        due = step % self._every == 0 or step == self._recipe.train.steps
        if due and (not self._rows or self._rows[-1]["step"] < step):
            self._validate(trainer, actor)

    def _validate(self, trainer: Trainer, actor: Actor) -> None:
        begun = time.perf_counter()
        figures = self._figures(trainer, actor, trainer.datamodule.environments)
        self._rows.append({"step": trainer.global_step, **figures, "seconds": time.perf_counter() - begun})
        if trainer.is_global_zero:
            lines = "".join(json.dumps(row) + "\n" for row in self._rows)
            write_atomically(self._path, lines.encode())
            told = "  ".join(f"{name.removeprefix('val/')} {figures[name]:.3f}" for name in sorted(figures))
            print(f"{self._recipe.name}  step {trainer.global_step}  held out: {told}", file=sys.stderr, flush=True)
        best = self._best()
        if trainer.global_step and best is self._rows[-1]:
            self._checkpoints.save(trainer)
        self._protect()

    def _figures(self, trainer: Trainer, actor: Actor, environments: Environments) -> dict[str, float]:
        grpo, keys = self._recipe.grpo, self._recipe.grpo.validation
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        speaks = parallel_state.get_tensor_model_parallel_rank() == 0
        modes = [think for think, share in ((False, 1 - grpo.thinking.share), (True, grpo.thinking.share)) if share]
        asked = [(task, think) for task in self._tasks for think in modes][rank::ranks]
        sampling = replace(
            sampling_of(grpo, self._recipe.seed, -1),
            samples=keys.num_generations,
            **({"temperature": 0.0, "top_p": 1.0, "top_k": 0} if keys.greedy else {}),
        )
        generator, backend = actor.generator, actor.backend(trainer.strategy.megatron_parallel)
        prompts = [
            replace(generator.encode(Prompt(task.messages, task.images, think)), number=task.uid)
            for task, think in asked
        ]
        found: dict[tuple[int, int], Any] = {}

        def on_reply(place: int, number: int, reply: Reply) -> None:
            task, think = asked[place]
            if speaks:
                episode = task.episode(reply, think)
                found[place, number] = environments.start_step([episode])[0]

        backend.refit()
        try:
            backend.generate(prompts, sampling, on_reply)
        finally:
            backend.free()
        mine = [
            (asked[place][0].task_name, asked[place][0].uid, asked[place][1], future.result())
            for (place, _), future in sorted(found.items())
        ]
        return _summary(gathered(first_of_tensor_group(mine if speaks else None)))

    def _best(self) -> Optional[dict[str, Any]]:
        metric = self._recipe.grpo.validation.metric
        rows = [row for row in self._rows if metric in row and row.get("val/unscorable_rate", 0) <= _MOST_UNSCORABLE]
        return max(rows, key=lambda row: row[metric], default=None)

    def _protect(self) -> None:
        best = self._best()
        self._checkpoints.protected = {best["step"]} if best else set()


def _summary(rows: list[tuple[str, int, bool, Reward]]) -> dict[str, float]:
    """Figures of (task, prompt, think, reward), without what there is nothing to tell of."""
    right, by_task, by_prompt = [], defaultdict(list), defaultdict(list)
    for task, uid, think, reward in rows:
        if reward.correct is not None:
            right.append(reward.correct)
            by_task[task].append(reward.correct)
            by_prompt[uid, think].append(reward.correct)
    rewards = [reward.value for *_, reward in rows if reward.value is not None]
    most = max(map(len, by_prompt.values()), default=0)
    return {
        "val/unscorable_rate": fmean(reward.value is None and not reward.masked for *_, reward in rows),
        **({"val/accuracy": fmean(right), "val/pass_at_1": fmean(right)} if right else {}),
        **({f"val/pass_at_{most}": fmean(map(any, by_prompt.values()))} if most > 1 else {}),
        **({"val/reward/mean": fmean(rewards)} if rewards else {}),
        **({f"val/{task}/accuracy": fmean(some) for task, some in by_task.items()} if len(by_task) > 1 else {}),
    }
