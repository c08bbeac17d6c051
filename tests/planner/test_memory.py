"""Planned bytes against measured ones, and against what layouts must do to them."""

import pytest
from planner_measured import DEVICE, MIXED_RESERVED, TEXT_STEPS, TOO_LARGE, VISION_ALLOCATED
from planner_pieces import full_recipe, in_fp8, measured_recipe

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import (
    Activation,
    ContextComm,
    Fp8Recipe,
    LoraConfig,
    LoraModule,
    ModelConfig,
    Part,
    ProjectorConfig,
    Recompute,
)
from nemo_bluelm.planner.devices import DEVICES
from nemo_bluelm.planner.layouts import Layout
from nemo_bluelm.planner.memory import GIB, most_tiles, stage_memory, stage_trained, stage_weights, stages_memory
from nemo_bluelm.runtime.params import count_parameters


@pytest.mark.parametrize("row", TEXT_STEPS)
def test_text_on_one_gpu(row):
    found = stage_memory(measured_recipe(row), 1, 0, 0)
    if row.allocated is not None:
        assert found.total / GIB == pytest.approx(row.allocated, rel=0.03)
    assert found.reserved / GIB == pytest.approx(row.reserved, rel=0.05)
    assert found.needed > found.reserved


@pytest.mark.parametrize("tiles", VISION_ALLOCATED)
def test_vision_on_one_gpu(tiles):
    owned, found = stage_weights(full_recipe(), 0), stage_memory(full_recipe(16384), 1, 0, tiles)
    weights = (owned.vision + owned.projector) * (2 + 4)
    assert (weights + found.vision + found.overhead) / GIB == pytest.approx(VISION_ALLOCATED[tiles], rel=0.06)


@pytest.mark.parametrize("fp8", MIXED_RESERVED)
def test_photos_and_text_on_one_gpu(fp8):
    settings = dict(train__micro_batch_size=2, train__cuda_graphs=True, parallel__distributed_optimizer=True)
    recipe = in_fp8(full_recipe(4096, 16, **settings), fp8)
    found = stage_memory(recipe, 1, 0, most_tiles(recipe))
    assert found.reserved / GIB == pytest.approx(MIXED_RESERVED[fp8], rel=0.02)


def test_what_ran_out_of_memory_does_not_fit():
    packs = TOO_LARGE["tokens"] // 4096
    recipe = full_recipe(4096, packs, train__micro_batch_size=packs, parallel__distributed_optimizer=True)
    assert not Layout(recipe, 1, DEVICES[DEVICE], TOO_LARGE["tiles"] // packs).fits


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_split(tied, recipe_file):
    tiny = load_recipe(recipe_file(), []).model
    tiny.language.share_embeddings_and_output_weights = tied
    tiny.language.num_layers = 6
    table = tiny.language.vocab_size * tiny.language.hidden_size
    whole = stage_weights(full_recipe(model=tiny), 0)

    recipe = full_recipe(model=tiny, parallel__pipeline=2, parallel__first_stage_layers=2)
    halves = [stage_weights(recipe, stage) for stage in range(2)]
    assert halves[1].vision == halves[1].projector == 0
    assert sum(half.language for half in halves) == whole.language + (table if tied else 0)

    split = stage_weights(full_recipe(model=tiny, parallel__tensor=2), 0)
    assert split.vision == whole.vision
    norms = 13 * tiny.language.hidden_size
    assert 2 * (split.language - norms) == whole.language - norms


def test_the_full_preset_has_its_published_size():
    """Part by part; that the built modules have as many is in tests/cli/test_plan.py."""
    assert stage_weights(full_recipe(), 0) == (412_987_248, 18_364_416, 2_458_421_760)


def test_gated_projector():
    gated = ModelConfig(projector=ProjectorConfig(False, Activation.swiglu))
    assert stage_weights(full_recipe(model=gated), 0).projector == count_parameters(gated)["projector"]
    # What a tile keeps for backward: no input of a norm, but two more outputs of the language model's width.
    kept = [stage_memory(full_recipe(model=model), 1, 0, 8).vision for model in (ModelConfig(), gated)]
    assert kept[1] - kept[0] == 8 * 196 * (2 * 2560 - 4 * 1152) * 2


def test_optimizer_states_are_sharded_over_data_and_context_ranks():
    alone = stage_memory(full_recipe(), 4, 0, 0).optimizer
    assert stage_memory(full_recipe(parallel__distributed_optimizer=True), 4, 0, 0).optimizer == alone / 4
    both = full_recipe(parallel__distributed_optimizer=True, parallel__context=2)
    assert stage_memory(both, 4, 0, 0).optimizer == alone / 8


def test_frozen_parts_have_no_gradient_and_no_states():
    found = stage_memory(full_recipe(freeze=[Part.vision, Part.language]), 1, 0, 8)
    trained = stage_weights(full_recipe(), 0).projector
    assert (found.gradients, found.optimizer) == (4 * trained, 12 * trained)
    assert found.vision < stage_memory(full_recipe(), 1, 0, 8).vision / 10


def test_with_lora_only_adapters_have_gradients_and_states():
    recipe = full_recipe()
    whole = stage_memory(recipe, 1, 0, 0)
    recipe.train.lora = LoraConfig(rank=8, modules=[LoraModule.linear_qkv])
    text = recipe.model.language
    adapters = 32 * 8 * (text.hidden_size + (20 + 2 * 4) * 128)
    below = stage_trained(recipe, 0) - adapters
    assert below == sum(stage_weights(recipe, 0)[:2])
    found = stage_memory(recipe, 1, 0, 0)
    assert (found.gradients, found.optimizer) == (4 * (below + adapters), 12 * (below + adapters))
    assert found.weights == whole.weights + 2 * adapters
    # Frozen products keep no input: the output projection's is attention's result, which attention keeps.
    assert whole.language - found.language == 4096 * 2 * 32 * (text.hidden_size + text.ffn_hidden_size)
    recipe.train.lora.modules = list(LoraModule)
    assert stage_memory(recipe, 1, 0, 0).language == whole.language


def test_what_lowers_activations():
    plain = stage_memory(full_recipe(32768), 1, 0, 64)
    for settings in (
        {"parallel__context": 2},
        {"parallel__context": 2, "parallel__context_comm": ContextComm.a2a},
        {"parallel__tensor": 2},
    ):
        split = stage_memory(full_recipe(32768, **settings), 1, 0, 64)
        assert plain.language / 2 <= split.language < plain.language
        assert split.logits < plain.logits and split.vision < plain.vision
        assert (
            stage_memory(full_recipe(32768, **settings, parallel__share_tiles=False), 1, 0, 64).vision == plain.vision
        )
    tensor = stage_memory(full_recipe(parallel__tensor=2), 1, 0, 0)
    assert stage_memory(full_recipe(parallel__tensor=2, parallel__sequence=True), 1, 0, 0).language < tensor.language

    by_recompute = [stage_memory(full_recipe(train__recompute__language=how), 1, 0, 0).language for how in Recompute]
    assert by_recompute == sorted(by_recompute, reverse=True) and by_recompute[2] < by_recompute[0] / 8
    some = full_recipe(train__recompute__language=Recompute.full, train__recompute__language_layers=8)
    assert by_recompute[2] < stage_memory(some, 1, 0, 0).language < by_recompute[0]
    by_recompute = [stage_memory(full_recipe(train__recompute__vision=how), 1, 0, 16).vision for how in Recompute]
    assert by_recompute == sorted(by_recompute, reverse=True) and by_recompute[2] < by_recompute[0] / 8


def test_the_first_stage_holds_most_micro_batches_and_the_last_the_logits():
    recipe = full_recipe(parallel__pipeline=4)
    stages = stages_memory(recipe, 1, 8)
    assert [round(stage.language / stages[3].language) for stage in stages] == [4, 3, 2, 1]
    assert [stage.logits > 0 for stage in stages] == [False, False, False, True]
    assert [stage.vision > 0 for stage in stages] == [True, False, False, False]
    few = stages_memory(full_recipe(batch=2, parallel__pipeline=4), 1, 8)
    assert round(few[0].language / few[3].language) == 2
    virtual = stages_memory(full_recipe(parallel__pipeline=4, parallel__virtual_pipeline=2), 1, 8)
    assert virtual[0].language > stages[0].language


def test_fp8_layers_left_in_bf16_have_no_copies():
    recipe = in_fp8(full_recipe(), Fp8Recipe.current)
    every = stage_memory(recipe, 1, 0, 0).fp8
    recipe.precision.fp8.bf16_first_layers, recipe.precision.fp8.bf16_last_layers = 1, 3
    assert stage_memory(recipe, 1, 0, 0).fp8 == pytest.approx(every * 28 / 32)
    recipe.parallel.pipeline = 2
    assert [stage_memory(recipe, 1, stage, 0).fp8 / every * 32 for stage in (0, 1)] == pytest.approx([15, 13])


def test_most_tiles():
    assert most_tiles(full_recipe(4096)) == 4095 // 196
    assert most_tiles(full_recipe(32768)) == 64  # data.max_tiles
    assert ModelConfig().geometry.tile == 378
