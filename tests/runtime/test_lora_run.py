"""A run with LoRA resumes bitwise, and its merged checkpoint is one without adapters."""

import pytest
import torch

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, read_metrics, resolve_checkpoint
from nemo_bluelm.runtime.single import load_model, single_process_world
from nemo_bluelm.train.merging import merge
from tests.runtime.processes import TRAIN

SETTINGS = [
    "train.lora.rank=4",
    "train.lora.dropout=0.2",
    "train.freeze=[vision,projector]",
    "optim.schedule=constant",
    "train.save_every=2",
]


def test_resumes_and_merges(corpus, forks, tmp_path):
    fixed = [f"data.root={corpus}", f"data.index={tmp_path / 'index'}", *SETTINGS]
    whole, halves, merged = (tmp_path / name for name in ("whole", "halves", "merged"))
    forks.run(*TRAIN, "tiny/align_projector", *fixed, f"run_dir={whole}", "train.steps=4", "optim.warmup_steps=1")
    for steps in (2, 4):
        forks.run(
            *(*TRAIN, "tiny/align_projector", *fixed),
            *(f"run_dir={halves}", f"train.steps={steps}", "optim.warmup_steps=1"),
        )
    curves = [[(row["loss"], row["grad_norm"]) for row in read_metrics(folder)] for folder in (whole, halves)]
    assert curves[0] == curves[1] and len(curves[0]) == 4

    merge(str(whole), merged)
    assert load_recipe(str(merged / RECIPE_FILE), []).train.lora.rank == 0
    with single_process_world():
        states = [load_model(folder)[0].state_dict() for folder in (resolve_checkpoint(str(whole), "run"), merged)]
    tensors = [{name: t for name, t in state.items() if isinstance(t, torch.Tensor)} for state in states]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    assert not any("adapter" in name for name in tensors[1])
    with pytest.raises(UserError, match="has no LoRA adapters"):
        merge(str(merged), tmp_path / "again")
