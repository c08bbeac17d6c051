"""Trains many layouts one after the other under torchrun: imports take longer than the runs.

    torchrun --nproc-per-node=N layout_worker.py OUT RUNS.json

RUNS.json holds {name: overrides}; those named "one*" run on rank 0 alone. Every rank leaves NAME/rankR.pt in OUT: loss,
gradients and their norm at every step, and the last weights.
"""

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch.distributed import PrefixStore, Store, TCPStore

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.data.loader import LoadedPack
from nemo_bluelm.layers.context import context_indices
from nemo_bluelm.runtime.environment import prepare
from nemo_bluelm.train import run
from nemo_bluelm.train.job import NextToken
from nemo_bluelm.train.packs import open_packs

ALIGNMENT = 4  # context parallelism aligns documents; every layout must see the same packs to be comparable
SOURCES = {"text": ["text"], "images": ["digits", "photos"], "mixed": ["digits", "photos", "text"]}
# What the packs of each step are. "turns" gives two data-parallel ranks text or images alone. Of "hollow" packs the
# first has targets in the rows of one context-parallel rank only, and the second has none, and so on.
STEPS = ("text", "images", "mixed", "turns", "hollow")


class Kinds:
    """A plan and a loader whose every step has packs of one kind, out of real plans and loaders."""

    def __init__(self, loaders: dict, global_batch_size: int):
        self.loaders, self.size, self.number = loaders, global_batch_size, 0
        self.plan, self.tokenizer, self.bad_samples = self, loaders["mixed"].tokenizer, 0
        self.sequence_length, self.tables = loaders["mixed"].plan.sequence_length, loaders["mixed"].plan.tables

    def __iter__(self):
        return self

    def __next__(self):
        kind, place = STEPS[self.number // self.size % len(STEPS)], self.number % self.size
        source = {"turns": ("text", "images")[place % 2], "hollow": "mixed"}.get(kind, kind)
        pack = next(self.loaders[source].plan)._replace(number=self.number)
        self.number += 1
        return replace_pack(pack, kind, source)

    def state(self):
        return {}

    def load(self, item) -> LoadedPack:
        loaded = self.loaders[item.source].load(item.pack)
        if item.kind != "hollow":
            return loaded
        batch, kept = loaded.batch, torch.zeros_like(loaded.batch.loss_mask)
        if item.pack.number % 2 == 0:
            kept[:, context_indices(batch.bounds, 2, 0)] = 1
        return replace(loaded, batch=replace(batch, loss_mask=batch.loss_mask * kept))


class replace_pack:
    """A pack with its number, and what to make of it."""

    def __init__(self, pack, kind: str, source: str):
        self.pack, self.kind, self.source, self.number = pack, kind, source, pack.number


class Recorder(Callback):
    """Loss and gradients of every step, and the weights after the last, each with its place in the global tensor."""

    def __init__(self):
        self.losses, self.norms, self.grads, self.weights = [], [], [], []

    def on_megatron_step_end(self, step, microbatch_outputs=None, reduced=None):
        from megatron.core import parallel_state

        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            self.losses.append(float(reduced))
        self.grads.append(self._pieces(step.pipeline, lambda weight: weight.main_grad))

    def on_train_batch_end(self, trainer, module, *args):
        self.norms.append(float(trainer.strategy.grad_norm))
        self.weights = self._pieces(trainer.strategy.megatron_parallel, lambda weight: weight.detach())

    @staticmethod
    def _pieces(pipeline, of):
        from nemo_bluelm.model.init import local_shards

        shards = [shard for chunk in pipeline for shard in local_shards(chunk.module.module, of)]
        return [(s.key, s.prepend_axis_num, s.global_shape, s.global_slice(), s.data.clone()) for s in shards]


def loaders(recipe) -> dict:
    """A loader for each kind of packs, of the recipe's data: aligned for two context ranks in every layout, since the
    alignment is part of what the packs hold."""
    aligned = replace(recipe.parallel, context=2)
    result = {}
    for kind, names in SOURCES.items():
        data = replace(recipe.data, sources={name: recipe.data.sources[name] for name in names})
        result[kind] = open_packs(replace(recipe, data=data, parallel=aligned))
    return result


def train(folder: Path, overrides: list[str], store: Store) -> None:
    from megatron.core import parallel_state

    from nemo_bluelm.runtime import strategy

    def build(recipe, origins):
        result = build_strategy(recipe, origins)
        result.store = store  # keys that no run before has used
        return result

    build_strategy, strategy.build_strategy = strategy.build_strategy, build

    recipe = load_recipe("recipes/tiny/sft.yaml", [*overrides, f"train.steps={len(STEPS)}"])
    recorder = Recorder()
    run.fit(NextToken(recipe, Kinds(loaders(recipe), recipe.train.global_batch_size)), [recorder])
    strategy.build_strategy = build_strategy
    parallel_state.destroy_model_parallel()
    folder.mkdir(parents=True, exist_ok=True)
    names = "losses", "norms", "grads", "weights"
    torch.save({name: getattr(recorder, name) for name in names}, folder / f"rank{os.environ['RANK']}.pt")


def main(out: str, runs: str) -> None:
    prepare()
    run.alignment = lambda recipe: ALIGNMENT
    environment = dict(os.environ)
    rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    store = TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False)  # the launcher's
    for number, (name, overrides) in enumerate(json.loads(Path(runs).read_text()).items()):
        alone = name.startswith("one")
        if alone and rank:
            continue
        size = 1 if alone else ranks
        os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        train(Path(out) / name, overrides, PrefixStore(str(number), store))
        gc.collect()
        gc.freeze()  # what the imports made is not searched again after every run


if __name__ == "__main__":
    main(*sys.argv[1:])
