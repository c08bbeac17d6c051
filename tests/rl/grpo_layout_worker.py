"""Runs GRPO in many layouts one after the other under torchrun.

    torchrun --nproc-per-node=N grpo_layout_worker.py RECIPE OUT RUNS.json

As tests/runtime/layout_worker.py, whose recorder it takes. Every rank also leaves the replies of each rollout; the runs
named "one*" check the training graph's log-probabilities, loss and gradients against sums that are done by hand.
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch.distributed import PrefixStore, Store, TCPStore

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from layout_worker import Recorder  # noqa: E402

from nemo_bluelm.config.compose import load_recipe  # noqa: E402
from nemo_bluelm.runtime.environment import prepare  # noqa: E402
from nemo_bluelm.train import run  # noqa: E402
from nemo_bluelm.train.continuity import find_origins  # noqa: E402


class Alone(Callback):
    """Before the first update: each reply by itself through the model, the loss from its formula, the gradients."""

    def __init__(self, rollouts: list, recipe, pad: int):
        self.rollouts, self.recipe, self.pad, self.found = rollouts, recipe, pad, {}

    def on_train_batch_start(self, trainer, actor, batch, batch_idx):
        if self.found:
            return
        keys = self.recipe.grpo
        replies = self.rollouts[-1]
        groups: dict[int, list[float]] = {}
        for one in replies:
            groups.setdefault(one.group, []).append(one.reward.value)
        losses, tokens, errors = [], 0, []
        for one in replies:
            written, prompt = one.reply.tokens, list(one.prompt.tokens)
            logits = self._logits(actor, [*prompt, *written], one.prompt.tiles)[len(prompt) - 1 :][: len(written)]
            every = (logits.float() / keys.generation.temperature).log_softmax(-1)
            logp = every.gather(1, torch.tensor(written)[:, None])[:, 0]
            errors.append((logp.detach() - torch.tensor(one.reply.logprobs)).abs().max())
            rewards = torch.tensor(groups[one.group], dtype=torch.float64)
            advantage = float((one.reward.value - rewards.mean()) / (rewards.std() + 1e-6))
            sampled = ~torch.tensor(one.reply.injected)
            tokens += int(sampled.sum())
            losses.append(-((logp - logp.detach()).exp() * advantage)[sampled].sum())
        loss = sum(losses) / tokens
        named = [(name, weight) for name, weight in actor.module.named_parameters() if weight.requires_grad]
        grads = torch.autograd.grad(loss, [weight for _, weight in named], allow_unused=True)
        self.found = {
            "loss": float(loss.detach()),
            "error": float(max(errors)),
            "grads": {name.removeprefix("module."): grad for (name, _), grad in zip(named, grads)},
        }
        self.pieces = {}

    def _logits(self, actor, tokens, tiles):
        from nemo_bluelm.data.chat import Encoded
        from nemo_bluelm.data.packs import collate

        encoded = Encoded(tokens, [False] * len(tokens))
        return actor.module(collate([encoded], tiles, len(tokens), 1, self.pad))[0]

    def on_megatron_step_end(self, step, microbatch_outputs=None, reduced=None):
        if not self.pieces:
            named = step.pipeline[0].module.module.named_parameters()
            self.pieces = {name: weight.main_grad.clone() for name, weight in named if weight.requires_grad}


def train(path: str, folder: Path, overrides: list[str], store: Store, alone: bool) -> None:
    from megatron.core import parallel_state

    from nemo_bluelm.rl import data_module
    from nemo_bluelm.rl.job import GRPO
    from nemo_bluelm.runtime import strategy

    def build(recipe, origins):
        result = build_strategy(recipe, origins)
        result.store = store  # keys that no run before has used
        return result

    build_strategy, strategy.build_strategy = strategy.build_strategy, build
    rollouts = []

    generator = data_module.RolloutGenerator

    class Kept(generator):
        def rollout(self, *args):
            result = super().rollout(*args)
            rollouts.append(result.rewarded)
            return result

    data_module.RolloutGenerator = Kept
    recipe = load_recipe(path, [*overrides, f"run_dir={folder / 'run'}"])
    recorder, job = Recorder(), GRPO(recipe)
    by_hand = Alone(rollouts, recipe, job.tokenizer.pad)
    try:
        run.fit(job, [recorder, *job.callbacks(None), *([by_hand] if alone else [])], find_origins(recipe))
    finally:
        job.close()
        strategy.build_strategy, data_module.RolloutGenerator = build_strategy, generator
    parallel_state.destroy_model_parallel()
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: getattr(recorder, name) for name in ("losses", "norms", "grads", "weights")}
    kept["replies"] = [
        [
            (one.group, one.number, tuple(one.prompt.tokens), one.reply.tokens, one.reply.injected, one.reward.value)
            for one in rewarded
        ]
        for rewarded in rollouts
    ]
    kept["logprobs"] = [{(one.group, one.number): one.reply.logprobs for one in rewarded} for rewarded in rollouts]
    if alone:
        kept["by_hand"], kept["first"] = by_hand.found, by_hand.pieces
    torch.save(kept, folder / f"rank{os.environ['RANK']}.pt")


def main(recipe: str, out: str, runs: str) -> None:
    prepare()
    environment = dict(os.environ)
    rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    store = TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False)  # the launcher's
    for number, (name, overrides) in enumerate(json.loads(Path(runs).read_text()).items()):
        alone = name.startswith("one")
        if alone and rank:
            continue
        size = 1 if alone else ranks
        os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        train(recipe, Path(out) / name, overrides, PrefixStore(str(number), store), alone)
        gc.collect()
        gc.freeze()  # what the imports made is not searched again after every run


if __name__ == "__main__":
    main(*sys.argv[1:])
