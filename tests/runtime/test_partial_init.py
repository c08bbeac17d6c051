"""A run starts from a checkpoint that has fewer or more weights than its model, and says which it took."""

import shutil

import pytest
import torch

from nemo_bluelm.runtime.run_dir import newest, parts_in
from tests.runtime.processes import TRAIN

FROZEN = "train.freeze=[vision,projector,language]"


def command(corpus, run_dir, *overrides):
    """One step; frozen parts keep the weights that they start with."""
    short = ["train.steps=1", "train.global_batch_size=2", "optim.warmup_steps=0"]
    settings = [f"data.root={corpus}", f"run_dir={run_dir}", *short]
    return [*TRAIN, "recipes/tiny/align_projector.yaml", *settings, *overrides]


def weights(checkpoint):
    """{name: tensor} of a checkpoint."""
    from nemo_bluelm.runtime.environment import prepare

    prepare()
    from megatron.core import dist_checkpointing

    from nemo_bluelm.runtime.single import single_process_world

    with single_process_world():
        found = dist_checkpointing.load_plain_tensors(str(checkpoint / "weights"))
    return {name.removeprefix("module."): value for name, value in found.items() if name.startswith("module.")}


def equal(found, expected, part, atol=0.0):
    names = {name for name in expected if name.startswith(f"{part}.")}
    assert names and names == {name for name in found if name.startswith(f"{part}.")}
    return all(torch.allclose(found[name], expected[name], rtol=0, atol=atol) for name in names)


@pytest.fixture(scope="module")
def whole(corpus, forks, tmp_path_factory):
    """A run whose every part has moved away from the initial weights."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    forks.run(*command(corpus, run_dir, "seed=5", "train.freeze=[]"))
    return newest(run_dir)


@pytest.fixture(scope="module")
def language_only(whole, tmp_path_factory):
    """Its language model alone, as pruning another model or an importer may leave it."""
    folder = tmp_path_factory.mktemp("language") / "checkpoint"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("weights", "checksums.json"))
    (folder / "weights").mkdir()
    write_part(whole, folder, "language")
    return folder


def write_part(source, target, part):
    from nemo_bluelm.runtime.environment import prepare

    prepare()
    from megatron.core import dist_checkpointing

    from nemo_bluelm.runtime.single import STATE_PREFIX, load_model, single_process_world

    with single_process_world():
        model, _, _ = load_model(source)
        state = model.sharded_state_dict(prefix=STATE_PREFIX)
        kept = {name: entry for name, entry in state.items() if name.startswith(f"{STATE_PREFIX}{part}.")}
        dist_checkpointing.save(kept, str(target / "weights"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_language_model_alone_starts_a_whole_model(ranks, corpus, forks, whole, language_only, tmp_path):
    """On two ranks it is split over a pipeline, so each knows a part of the names only."""
    layout = ["parallel.pipeline=2"] if ranks == 2 else []
    assert {part.value for part in parts_in(language_only)} == {"language"}
    fresh = ["train.freeze=[language]", "optim.lr=1e-30"]  # a step too small to change what is new
    output = forks.run(*command(corpus, tmp_path / "run", *layout, *fresh, f"init_from={language_only}"), ranks=ranks)
    lines = [line for line in output.splitlines() if line.startswith("init_from")]
    assert [line.split("  ")[1].split(" tensors")[0] for line in lines] == [
        "vision: 0 loaded, 29 new, 0 skipped",
        "projector: 0 loaded, 6 new, 0 skipped",
        "language: 8 loaded, 0 new, 0 skipped",
    ]
    forks.run(*command(corpus, tmp_path / "scratch", *fresh))
    found, scratch = weights(newest(tmp_path / "run")), weights(newest(tmp_path / "scratch"))
    assert equal(found, weights(whole), "language") and not equal(found, scratch, "language")
    assert equal(found, scratch, "vision", 1e-20), "new weights are those of a run from scratch"


@pytest.mark.slow
def test_the_vision_transformer_of_another_checkpoint(corpus, forks, whole, language_only, tmp_path):
    """Language and ViT of two checkpoints, each of which has that part alone; the projector is new."""
    vision_only = tmp_path / "vision"
    shutil.copytree(language_only, vision_only, ignore=shutil.ignore_patterns("weights"))
    (vision_only / "weights").mkdir()
    write_part(whole, vision_only, "vision")
    origins = [f"init_from={language_only}", f"init_vision_from={vision_only}"]
    output = forks.run(*command(corpus, tmp_path / "run", "train.freeze=[vision,language]", *origins))
    lines = [line for line in output.splitlines() if line.startswith("init_")]
    assert [(line.split()[0], line.split("  ")[1].split(" tensors")[0]) for line in lines] == [
        ("init_from", "projector: 0 loaded, 6 new, 0 skipped"),
        ("init_from", "language: 8 loaded, 0 new, 0 skipped"),
        ("init_vision_from", "vision: 29 loaded, 0 new, 0 skipped"),
    ]
    found = weights(newest(tmp_path / "run"))
    assert equal(found, weights(whole), "language") and equal(found, weights(whole), "vision")


@pytest.mark.slow
def test_layers_that_only_one_of_them_has(corpus, forks, whole, tmp_path):
    """A shorter ViT and LoRA's adapters: some tensors are left out, some are new."""
    fewer = ["model.vision.num_layers=1", "train.lora.rank=2", "train.freeze=[vision]"]
    output = forks.run(*command(corpus, tmp_path / "run", *fewer, f"init_from={whole}"))
    lines = [line.split("  ")[1] for line in output.splitlines() if line.startswith("init_from")]
    assert lines[0].startswith("vision: 17 loaded, 0 new, 12 skipped tensors (skipped: vision.blocks.layers.1.")
    assert lines[1] == "projector: 6 loaded, 0 new, 0 skipped tensors"
    assert lines[2].startswith(
        "language: 8 loaded, 8 new, 0 skipped tensors (new: language.decoder.layers.mlp.linear_fc1"
    )
    found, origin = weights(newest(tmp_path / "run")), weights(whole)
    for name, value in found.items():
        if "adapter" not in name and not name.startswith("projector."):
            assert torch.equal(value, origin[name]), name
