"""Estimated steps against measured ones, and what layouts and devices must do to them."""

import pytest
from planner_pieces import TEXT_ONLY, full_recipe, in_fp8

from nemo_bluelm.config.schema import ContextComm, Fp8Recipe, Part, Recompute
from nemo_bluelm.errors import UserError
from nemo_bluelm.model.flops import pack_flops
from nemo_bluelm.planner.cost import estimate
from nemo_bluelm.planner.devices import DEVICES, find_device

H100 = DEVICES["h100"]


@pytest.mark.parametrize(
    "packs, graphs, fp8, measured",
    [
        (1, True, None, 0.606),
        (2, False, None, 0.618),
        (1, False, None, 0.819),
        (2, True, Fp8Recipe.delayed, 0.477),
        (2, False, Fp8Recipe.delayed, 0.516),
        (1, False, Fp8Recipe.delayed, 0.972),
        (1, True, Fp8Recipe.current, 0.522),
        (2, False, Fp8Recipe.current, 0.563),
        (2, False, Fp8Recipe.blockwise, 0.586),
    ],
)
def test_text_on_one_gpu(packs, graphs, fp8, measured):
    """Seconds of steps of 16,384 tokens of text on an H100, from which the rates come."""
    recipe = full_recipe(4096, 4, TEXT_ONLY, train__micro_batch_size=packs, train__cuda_graphs=graphs)
    found = estimate(in_fp8(recipe, fp8), 1, H100, 0)
    assert found.seconds == pytest.approx(measured, rel=0.05)
    assert found.flops == 4 * pack_flops(recipe.model, [4096], 0, TEXT_ONLY).total
    assert found.mfu == pytest.approx(found.flops / found.seconds / 989.4e12)
    assert sum(found.sent.values()) == 0


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
    assert hidden.data == 0
    assert estimate(full_recipe(parallel__overlap=False), 8, H100, 0).data > 0.05
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


def test_devices():
    for device in DEVICES.values():
        assert device.peak > 300e12 and device.network < device.nvlink < device.hbm
    assert find_device("h200").memory > find_device("h100").memory
    with pytest.raises(UserError, match="--device is h900; it must be one of a100_40, a100, h100"):
        find_device("h900")
