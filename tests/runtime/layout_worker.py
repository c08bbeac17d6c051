"""Trains a recipe under torchrun and leaves each rank's losses, weights and first-step gradients in a folder."""

import os
import sys
from pathlib import Path

import torch

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.runtime.environment import prepare

prepare()

from lightning.pytorch import Callback  # noqa: E402

from nemo_bluelm.model.init import local_shards  # noqa: E402
from nemo_bluelm.train import run  # noqa: E402



class Recorder(Callback):
    def __init__(self):
        self.losses, self.grads, self.weights = [], None, None

    def on_megatron_step_end(self, step, microbatch_outputs=None, reduced=None):
        if reduced is not None and float(reduced):
            self.losses.append(float(reduced))
        if self.grads is None:
            self.grads, self.weights = [], []
            for chunk in step.pipeline:
                model = chunk.module.module
                trained = {id(p) for p in model.parameters() if p.requires_grad}
                for shard in local_shards(model):
                    self.weights.append((shard.key, shard.global_shape, shard.global_slice(), shard.data.clone()))
                grads = local_shards(model, of=lambda p: p.main_grad if id(p) in trained else torch.zeros_like(p))
                self.grads += [(s.key, s.global_shape, s.global_slice(), s.data.clone()) for s in grads]


if __name__ == "__main__":
    out, recipe_path, *overrides = sys.argv[1:]
    recipe = load_recipe(recipe_path, overrides)
    recorder = Recorder()
    # Context parallelism aligns documents; every layout must see the same packs to be comparable.
    run.alignment = lambda recipe: 4
    run.fit(recipe, run.open_data(recipe), [recorder])
    torch.save({k: getattr(recorder, k) for k in ('losses', 'grads', 'weights')}, Path(out) / f"rank{os.environ.get('RANK', '0')}.pt")
