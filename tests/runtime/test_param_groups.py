"""Learning rates and weight decays by part and ViT layer, as the optimizer that trains has them."""

import json
from pathlib import Path

import pytest

from nemo_bluelm.config.optim import OptimConfig, PartOptimConfig, PartsOptimConfig
from nemo_bluelm.runtime.environment import prepare
from tests.runtime.processes import torchrun

prepare()  # before anything imports Megatron-Core

from nemo_bluelm.runtime.param_groups import Multipliers  # noqa: E402

WORKER = Path(__file__).with_name("groups_worker.py")
PARTS = [
    *("optim.lr=1e-3", "optim.min_lr=1e-4", "optim.warmup_steps=1", "optim.weight_decay=0.1"),
    *("optim.schedule=wsd", "optim.decay_steps=2", "optim.decay_shape=linear"),
    *("optim.parts.vision.lr=5e-4", "optim.parts.vision.weight_decay=0", "optim.vision_layer_decay=0.5"),
    *("optim.parts.projector.lr=2e-3", "optim.parts.projector.weight_decay=0.2"),
    *("train.steps=4", "data.sequence_length=128", "model.vision.num_layers=3"),
]
SCHEDULE = [1.0, 1.0, 1.0, 0.55]  # of optim.lr: warm, stable, the decay's first step at the peak, half way to a tenth
LAYOUTS = {
    "tensor": ["parallel.tensor=2", *PARTS],
    "pipeline": ["parallel.pipeline=2", *PARTS],
    "virtual_pipeline": [
        *("parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.language.num_layers=4", *PARTS),
    ],
    "frozen": ["train.freeze=[vision]", "train.steps=1", "data.sequence_length=128", "optim.warmup_steps=0"],
    "data": [*PARTS],
}
# Learning rates over optim.lr; the ViT has half of it at the top.
VISION = {"layers.2.": 0.5, "layers.1.": 0.25, "layers.0.": 0.125, "embedding": 0.0625, "final_layernorm": 0.5}
DECAYS = {"vision": 0.0, "projector": 0.2, "language": 0.1}


@pytest.fixture(scope="module")
def recorded(corpus, tmp_path_factory):
    """What both ranks told of each layout."""
    folder = tmp_path_factory.mktemp("groups")
    data = [f"data.root={corpus}", f"data.index={folder / 'index'}"]
    (folder / "runs.json").write_text(json.dumps({name: [*data, *more] for name, more in LAYOUTS.items()}))
    torchrun(2, WORKER, folder, folder / "runs.json", timeout=200)
    return {name: [json.loads((folder / name / f"rank{r}.json").read_text()) for r in (0, 1)] for name in LAYOUTS}


def expected_rate(name: str) -> float:
    if "vision." in name:
        return next(rate for place, rate in VISION.items() if place in name)
    return 2.0 if "projector." in name else 1.0


def is_vector(name: str) -> bool:
    return name.endswith("bias") or "norm" in name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tensor", "pipeline", "virtual_pipeline", "data"])
def test_every_weight_has_its_own_rates_at_every_step(layout, recorded):
    seen = set()
    for rank in recorded[layout]:
        assert len(rank["steps"]) == len(SCHEDULE)
        for factor, rates in zip(SCHEDULE, rank["steps"]):
            for name, (lr, decay) in rates.items():
                part = next(part for part in DECAYS if f"{part}." in name)
                assert lr == pytest.approx(1e-3 * factor * expected_rate(name), rel=1e-12), name
                assert decay == pytest.approx(0.0 if is_vector(name) else DECAYS[part], rel=1e-12), name
                seen.add((part, is_vector(name)))
    assert seen == {(part, vector) for part in DECAYS for vector in (False, True)}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_have_the_same_groups_in_one_order(layout, recorded):
    """A pipeline stage without ViT has its groups too, empty; schedulers and checkpoints go by their order."""
    one, other = ([group[:2] for group in rank["groups"]] for rank in recorded[layout])
    assert one == other and len(one) == len(set(map(tuple, one)))
    if layout == "pipeline":
        assert [group[2] for group in recorded[layout][1]["groups"]].count(0) >= 4


@pytest.mark.slow
def test_without_own_rates_there_are_megatrons_two_groups(recorded):
    assert [group[:2] for group in recorded["frozen"][0]["groups"]] == [[1.0, 1.0], [1.0, 0.0]]


def test_a_part_may_decay_where_the_others_do_not():
    parts = PartsOptimConfig(language=PartOptimConfig(weight_decay=0.3))
    multipliers = Multipliers(OptimConfig(lr=1.0, weight_decay=0.0, parts=parts), vision_layers=2)
    assert multipliers.weight_decay == 0.3
    assert multipliers.of("module.module.language.decoder.layers.0.mlp.linear_fc1.weight") == (1.0, 1.0)
    assert multipliers.of("module.vision.patch_embedding.weight") == (1.0, 0.0)
    assert Multipliers(OptimConfig(lr=1.0, weight_decay=0.0), 2).of("projector.norm.weight") == (1.0, 1.0)


def test_layer_decay_as_beit_counts_it():
    """27 layers of 0.9: the lowest has 0.9^26 of the top's learning rate, the embeddings 0.9^27."""
    multipliers = Multipliers(OptimConfig(lr=1.0, vision_layer_decay=0.9), vision_layers=27)
    rates = {
        "vision.blocks.layers.26.mlp.linear_fc1.weight": 1.0,
        "vision.blocks.layers.25.self_attention.linear_qkv.weight": 0.9,
        "vision.blocks.layers.0.input_layernorm.weight": 0.9**26,
        "vision.patch_embedding.bias": 0.9**27,
        "vision.position_embedding": 0.9**27,
        "vision.blocks.final_layernorm.weight": 1.0,
        "projector.linear_fc1.weight": 1.0,
        "language.decoder.layers.0.mlp.linear_fc1.weight": 1.0,
    }
    assert {name: multipliers.of(f"module.{name}")[0] for name in rates} == pytest.approx(rates)
