"""Estimated steps against measured ones, and what layouts and devices must do to them."""

import pytest
from planner_measured import DEVICE, KERNELS, TEXT_STEPS, VISION_MILLISECONDS
from planner_pieces import TEXT_ONLY, full_recipe, in_fp8, measured_recipe

from nemo_bluelm.config.schema import ContextComm, Fp8Recipe, LoraConfig, Part, Recompute
from nemo_bluelm.errors import UserError
from nemo_bluelm.model.flops import pack_flops
from nemo_bluelm.planner.cost import SLOWED, estimate
from nemo_bluelm.planner.devices import DEVICES, find_device

H100 = DEVICES["h100"]


@pytest.mark.parametrize("row", [row for row in TEXT_STEPS if row.milliseconds])
def test_text_on_one_gpu(row):
    recipe = measured_recipe(row)
    found = estimate(recipe, 1, DEVICES[DEVICE], 0)
    assert found.seconds * 1000 == pytest.approx(row.milliseconds, rel=0.05)
    assert found.optimizer * 1000 == pytest.approx(KERNELS["optimizer"], rel=0.05)
    packs = recipe.train.global_batch_size
    assert found.flops == packs * pack_flops(recipe.model, [row.length], 0, TEXT_ONLY).total
    assert found.mfu == pytest.approx(found.flops / found.seconds / 989.4e12)
    assert sum(found.sent.values()) == 0


@pytest.mark.parametrize("fp8", VISION_MILLISECONDS)
def test_vision_on_one_gpu(fp8):
    """What 64 tiles add to a step."""
    recipe = in_fp8(full_recipe(16384, 1, parallel__distributed_optimizer=True), fp8)
    recipe.precision.fp8.parts = [Part.vision]
    with_tiles, without = (estimate(recipe, 1, DEVICES[DEVICE], tiles).compute for tiles in (64, 0))
    assert (with_tiles - without) * 1000 == pytest.approx(VISION_MILLISECONDS[fp8], rel=0.05)


def test_layers_left_in_bf16_take_longer():
    recipe, plain = in_fp8(full_recipe(), Fp8Recipe.current), full_recipe()
    every, none = (estimate(one, 1, H100, 0).compute for one in (recipe, plain))
    recipe.precision.fp8.bf16_first_layers, recipe.precision.fp8.bf16_last_layers = 3, 5
    assert estimate(recipe, 1, H100, 0).compute == pytest.approx(0.75 * every + 0.25 * none)


def test_lora_leaves_out_what_frozen_weights_do_not_need():
    recipe, whole = (full_recipe(freeze=TEXT_ONLY, train__micro_batch_size=4) for _ in range(2))
    recipe.train.lora = LoraConfig(rank=8)
    found, full = (estimate(one, 1, H100, 0) for one in (recipe, whole))
    assert 0.7 < found.flops / full.flops < 0.8
    assert found.seconds < 0.85 * full.seconds and found.optimizer < full.optimizer / 50
    assert found.flops == 64 * pack_flops(recipe.model, [4096], 0, TEXT_ONLY, recipe.train.lora).total
    recipe.train.recompute.language = whole.train.recompute.language = Recompute.full
    again, full_again = (estimate(one, 1, H100, 0) for one in (recipe, whole))  # one more forward for both
    assert again.compute - found.compute == pytest.approx(full_again.compute - full.compute, rel=0.05)


def test_small_micro_batches_wait_for_the_host():
    eager, graphs = (full_recipe(2048, 8, TEXT_ONLY, train__cuda_graphs=graphs) for graphs in (False, True))
    assert estimate(eager, 1, H100, 0).compute > 2 * estimate(graphs, 1, H100, 0).compute
    for fp8 in Fp8Recipe:
        assert estimate(in_fp8(graphs, fp8), 1, H100, 0).compute < estimate(graphs, 1, H100, 0).compute


def test_bytes_sent():
    weights = 2_889_773_424
    ring = estimate(full_recipe(), 4, H100, 8).sent
    assert ring == {"tensor": 0, "context": 0, "pipeline": 0, "tiles": 0, "data": 2 * 4 * weights * 3 / 4}
    sharded = estimate(full_recipe(parallel__distributed_optimizer=True), 4, H100, 8).sent
    assert sharded["data"] == (4 + 2) * weights * 3 / 4
    hidden, count = 4096 * 2560 * 2, 64  # bytes of the residual stream; micro-batches
    tensor = estimate(full_recipe(parallel__tensor=4), 4, H100, 8).sent
    assert tensor["tensor"] == (32 * 8 + 4) * hidden * 3 / 4 * count
    assert tensor["tiles"] == 2 * 8 * 196 * 2560 * 2 * 3 / 4 * count
    context = estimate(full_recipe(parallel__context=4), 4, H100, 0).sent
    assert context["context"] == 32 * 2 * (4096 * 2 * 512 * 2) * 3 / 4 * count  # keys and values, there and back
    a2a = estimate(full_recipe(parallel__context=4, parallel__context_comm=ContextComm.a2a), 4, H100, 0).sent
    assert a2a["context"] == 32 * 2 * (1024 * (2 * 2560 + 2 * 512) * 2) * 3 / 4 * count
    pipeline = estimate(full_recipe(parallel__pipeline=4), 4, H100, 0).sent
    assert pipeline["pipeline"] == 2 * hidden * count


def test_causes():
    plain = estimate(full_recipe(), 1, H100, 8)
    assert plain.seconds == pytest.approx(plain.compute + plain.optimizer)
    assert plain.gpu_hours(1000) == pytest.approx(1000 * plain.seconds / 3600)

    stages = estimate(full_recipe(parallel__pipeline=4), 4, H100, 0)
    assert stages.bubble == pytest.approx(3 / 64 * (stages.compute + stages.pipeline))
    virtual = estimate(full_recipe(parallel__pipeline=4, parallel__virtual_pipeline=2), 4, H100, 0)
    assert virtual.bubble == pytest.approx(3 / 2 / 64 * (virtual.compute + virtual.pipeline))

    hidden = estimate(full_recipe(train__micro_batch_size=2), 8, H100, 0)  # behind the last micro-batch's backward
    seen = estimate(full_recipe(train__micro_batch_size=2, parallel__overlap=False), 8, H100, 0)
    assert seen.data > 0.05
    later = 72 * 2 * (20e-6 + 7 * 3.4e-6)  # an all-reduce for each of 73 buckets, not one
    assert hidden.data == pytest.approx(SLOWED * (seen.data + later))  # it is in the way of what hides it
    split = [full_recipe(32768, parallel__context=4, parallel__share_tiles=share) for share in (True, False)]
    shared, alone = (estimate(recipe, 4, H100, 100) for recipe in split)
    assert shared.compute < 0.7 * alone.compute
    for part in (Part.vision, Part.language):
        recipes = [full_recipe(16384, **{f"train__recompute__{part.value}": how}) for how in Recompute]
        again = [estimate(recipe, 1, H100, 80) for recipe in recipes]
        assert again[0].compute < again[1].compute < again[2].compute < 4 / 3 * again[0].compute
        assert again[0].flops == again[2].flops


def test_rings_across_nodes_are_slower():
    recipe = full_recipe(32768, 256, parallel__context=8, parallel__tensor=4, parallel__overlap=False)
    inside = full_recipe(32768, 256, parallel__context=8, parallel__overlap=False)
    across, within = estimate(recipe, 32, H100, 0), estimate(inside, 32, H100, 0)
    assert across.context / across.sent["context"] > 1.5 * within.context / within.sent["context"]


def test_rings_of_many_ranks_are_slower():
    """The same bytes, but a hop more for each rank, and dearer ones between nodes."""
    recipes = [full_recipe(4096, gpus, parallel__distributed_optimizer=True) for gpus in (8, 16, 1024)]
    found = [estimate(recipe, recipe.train.global_batch_size, H100, 0) for recipe in recipes]
    rates = [one.data / one.sent["data"] for one in found]
    assert rates[0] < rates[1] < rates[2]
    alone = [full_recipe(4096, gpus, parallel__overlap=False) for gpus in (512, 1024)]
    few, many = (estimate(recipe, recipe.train.global_batch_size, H100, 0) for recipe in alone)
    hops = 2 * (448 * 3.4e-6 + 64 * 14e-6)  # one all-reduce, 512 ranks more of which 64 are on other nodes
    rate = few.sent["data"] / (few.data - 2 * (20e-6 + 448 * 3.4e-6 + 63 * 14e-6))
    assert many.data - few.data == pytest.approx(hops + (many.sent["data"] - few.sent["data"]) / rate, rel=0.01)


def test_devices():
    for device in DEVICES.values():
        assert device.peak > 300e12 and device.network < device.nvlink < device.hbm
    assert find_device("h200").memory > find_device("h100").memory
    with pytest.raises(UserError, match="--device is h900; it must be one of a100_40, a100, h100"):
        find_device("h900")
