"""Every full-scale recipe takes real steps at full width, on photos and texts, with few layers.

The recipes are as they ship, their folders of shards included; only the layers, the steps and the batch are fewer.
"""

import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from nemo_bluelm.runtime.run_dir import read_metrics
from tests.runtime.processes import TRAIN, finish, start

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS = 3
# What each of the recipes' folders holds here.
FOLDERS = {
    "image_text": "images-*.tar",
    "captions": "images-*.tar",
    "sft_image_text": "images-*.tar",
    "reasoning_image": "images-*.tar",
    "long_image_text": "images-*.tar",
    "text": "docs-*.tar",
    "sft_text": "docs-*.tar",
    "reasoning_text": "docs-*.tar",
    "long_text": "text-32768-*.tar",
}
MIXED = ("image_text", "reasoning_image", "text", "reasoning_text")
FEWER = ["parallel=single", "model.vision.num_layers=2", "model.language.num_layers=2", "optim.warmup_steps=1"]
FEWER += ["optim.lr=1e-5", "optim.min_lr=0"]  # the recipes' own are for batches that are hundreds of times as large
FEWER += [f"train.steps={STEPS}", "train.global_batch_size=2", f"train.save_every={STEPS}", "init_from=null"]
FIRST = {
    "align_projector": ["init_vision_from=null"],
    "joint_pretrain": ["precision=fp8_delayed"],
    "reasoning_pretrain": [],
    # Nothing here is tagged as key data.
    "decay": ["optim.decay_steps=1", *(f"~data.sources.{source}.resample.key" for source in MIXED)],
    "long_context": [],
    "sft": [],
}
# After the first, one of which is the teacher.
SECOND = {
    "text_pretrain": ("text_pretrain", ["distill.teacher={runs}/joint_pretrain"]),
    "sft_lora": ("sft", ["train.lora.rank=8", "init_from={runs}/sft"]),
    "joint_sharded": ("joint_pretrain", ["parallel.distributed_optimizer=true"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """All runs; those of a group side by side, because most of each is its start."""
    pytest.importorskip("transformer_engine")
    root, runs = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("runs")
    made = os.environ.get("NEMO_BLUELM_BENCH_CORPUS")  # where the packages that it is made from are missing
    if made is None:
        made = root / "made"
        code, output = finish(start("-m", "nemo_bluelm.cli.main", "bench", "corpus", made), timeout=300)
        assert code == 0, output
    shutil.copy(Path(made) / "tokenizer.json", root)
    for folder, shards in FOLDERS.items():
        (root / folder).mkdir()
        for shard in Path(made).glob(shards):
            shutil.copy(shard, root / folder)
    finish_all(runs, root, {name: (name, overrides) for name, overrides in FIRST.items()})
    finish_all(runs, root, SECOND)
    return runs


def finish_all(runs: Path, root: Path, cases: dict[str, tuple[str, list[str]]]) -> None:
    """Start the cases side by side and keep their output and exit code beside their runs."""
    started = {}
    for name, (recipe, overrides) in cases.items():
        folders = [f"data.root={root}", f"data.index={runs / 'index' / name}", f"run_dir={runs / name}"]
        special = [override.format(runs=runs) for override in overrides]
        started[name] = start(*TRAIN, recipe, *FEWER, *folders, *special)
    for name, process in started.items():
        code, output = finish(process, timeout=400)
        (runs / f"{name}.log").write_text(f"exit code {code}\n{output}")


@pytest.mark.parametrize("name", [*FIRST, *SECOND])
def test_three_steps(name, runs):
    log = (runs / f"{name}.log").read_text()
    assert log.startswith("exit code 0\n"), log[-3000:]
    steps = read_metrics(runs / name)
    print(name, [round(step["loss"], 3) for step in steps], steps[-1]["tokens_by_source"])
    assert len(steps) == STEPS and all(math.isfinite(step["loss"]) for step in steps)
    assert steps[-1]["loss"] < steps[0]["loss"] + 0.1
    seen = steps[-1]["tokens_by_source"]
    assert name == "text_pretrain" or any(tokens for source, tokens in seen.items() if source != "text")
