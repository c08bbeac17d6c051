"""Trains a recipe under torchrun and leaves each rank's losses, weights and first-step gradients in a folder."""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.runtime.environment import prepare
from nemo_bluelm.train import run

ALIGNMENT = 4  # context parallelism aligns documents; every layout must see the same packs to be comparable


class Recorder(Callback):
    """Loss of every step; weights before and gradients of the first one, each with its place in the global tensor."""

    def __init__(self):
        self.losses, self.weights, self.grads = [], [], []

    def on_megatron_step_end(self, step, microbatch_outputs=None, reduced=None):
        from megatron.core import parallel_state

        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            self.losses.append(float(reduced))
        if not self.grads:
            for chunk in step.pipeline:
                model = chunk.module.module
                self.weights += self._pieces(model, lambda weight: weight.detach())
                self.grads += self._pieces(model, lambda weight: weight.main_grad)

    @staticmethod
    def _pieces(model, of):
        from nemo_bluelm.model.init import local_shards

        return [(s.key, s.global_shape, s.global_slice(), s.data.clone()) for s in local_shards(model, of)]


def main(out: str, recipe_path: str, *overrides: str) -> None:
    recipe = load_recipe(recipe_path, list(overrides))
    run.alignment = lambda recipe: ALIGNMENT
    loader = run.open_data(recipe)
    prepare()
    recorder = Recorder()
    run.fit(recipe, loader, [recorder])
    recorded = {"losses": recorder.losses, "weights": recorder.weights, "grads": recorder.grads}
    torch.save(recorded, Path(out) / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
