"""Proposals pass the checks and fit; where nothing does, it is said what would."""

import pytest
from planner_pieces import full_recipe, in_fp8

from nemo_bluelm.config.checks import check_recipe
from nemo_bluelm.config.schema import ContextComm, Fp8Recipe, LanguageConfig, ModelConfig, Recompute
from nemo_bluelm.errors import UserError
from nemo_bluelm.planner import layouts
from nemo_bluelm.planner.devices import DEVICES
from nemo_bluelm.planner.layouts import (
    Layout,
    best,
    fastest,
    nearest,
    propose,
    scaling,
    with_settings,
)
from nemo_bluelm.planner.summary import check_layout, device_summary, flops_summary

H100 = DEVICES["h100"]


def big_model() -> ModelConfig:
    """About 70 billion parameters."""
    shape = dict(num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, num_query_groups=8)
    return ModelConfig(language=LanguageConfig(**shape))


@pytest.mark.parametrize("world_size", [1, 8, 12])
def test_every_proposal_is_valid_and_fits(world_size):
    recipe = full_recipe(32768, 48)
    proposed = propose(recipe, world_size, DEVICES["h200"], 64)
    assert proposed
    for layout in proposed:
        check_recipe(layout.recipe, world_size)
        assert layout.fits and layout.needed <= DEVICES["h200"].memory
        assert layout.recipe.train.global_batch_size == 48 and layout.recipe.data.sequence_length == 32768
    seconds = [round(layout.estimate.seconds, 4) for layout in proposed]
    assert seconds == sorted(seconds)
    assert best(recipe, world_size, DEVICES["h200"], 64) == proposed[0]


def test_a_context_rank_keeps_enough_tokens():
    contexts = {layout.recipe.parallel.context for layout in propose(full_recipe(4096, 16), 64, H100, 0)}
    assert contexts == {1, 2, 4}
    assert max(layout.recipe.parallel.context for layout in propose(full_recipe(32768, 1), 32, H100, 0)) == 32


def test_a_small_batch_grows_until_a_gpu_has_enough_to_do():
    recipe = full_recipe(4096, 16)
    found, own, most = fastest(recipe, 256, H100, 0), best(recipe, 256, H100, 0), full_recipe(4096, 8 * 256)
    reference = best(most, 256, H100, 0).estimate.mfu
    assert own.estimate.mfu < 0.5 * reference
    batch = found.recipe.train.global_batch_size
    assert batch >= 256 and found.estimate.mfu >= 0.9 * reference
    half = best(with_settings(recipe, {"train.global_batch_size": batch // 2}), 256, H100, 0)
    assert half.estimate.mfu < 0.9 * reference
    enough = full_recipe(4096, 2048)
    assert fastest(enough, 8, H100, 0).recipe.train.global_batch_size == 2048
    odd = fastest(full_recipe(4096, 999), 8, H100, 0)
    assert odd.recipe.train.global_batch_size % 999 == 0


def test_proposals_with_cuda_graphs_compute_no_decoder_layer_again():
    recipe = full_recipe(32768, 8, train__cuda_graphs=True)
    proposed = propose(recipe, 8, DEVICES["b200"], 64)
    assert proposed
    for layout in proposed:
        check_recipe(layout.recipe, 8)


def test_a_small_model_is_not_split_and_a_large_one_is():
    small = fastest(full_recipe(4096, 256), 64, H100, 8).recipe.parallel
    assert (small.tensor, small.pipeline, small.context) == (1, 1, 1)
    large = fastest(full_recipe(4096, 256, model=big_model()), 64, H100, 8).recipe.parallel
    assert large.tensor * large.pipeline >= 8
    assert propose(full_recipe(4096, 256, model=big_model()), 1, H100, 8) == []


def test_overrides_turn_the_recipe_into_the_proposal():
    recipe = full_recipe(32768, 8, parallel__context_comm=ContextComm.a2a)
    settings = dict(
        parallel__context=2,
        parallel__tensor=2,
        parallel__sequence=True,
        parallel__context_comm=ContextComm.all_gather,
        train__recompute__vision=Recompute.mlp,
    )
    other = Layout(full_recipe(32768, 8, **settings), 4, H100, 0)
    assert other.overrides(recipe) == [
        "parallel.tensor=2",
        "parallel.sequence=true",
        "parallel.context=2",
        "parallel.context_comm=all_gather",
        "train.recompute.vision=mlp",
    ]
    assert other.overrides(other.recipe) == []


def test_nearest_changes_least():
    recipe = full_recipe(32768, 64, parallel__distributed_optimizer=True)
    assert not Layout(recipe, 8, H100, 64).fits
    closest = nearest(recipe, 8, H100, 64)
    assert closest.fits and closest.overrides(recipe) == ["train.recompute.vision=mlp", "train.recompute.language=mlp"]
    recipe = full_recipe(32768, 64, train__recompute__vision=Recompute.mlp, train__cuda_graphs=True)
    assert nearest(recipe, 8, H100, 64).overrides(recipe)[0] == "parallel.tensor=2"
    assert nearest(full_recipe(4096, 64, model=big_model()), 8, H100, 8) is None


def test_nearest_is_the_same_with_and_without_a_device():
    """More packs, not packs in slivers."""
    recipe = full_recipe(4096, 16, train__micro_batch_size=2, parallel__distributed_optimizer=True)
    for device in (None, H100):
        with pytest.raises(UserError, match=r"; the nearest that fits[^:]*: train.global_batch_size=2048$"):
            check_layout(recipe, 1024, device, 20)


def test_too_large_says_what_fits():
    recipe = full_recipe(32768, 64)
    summary = device_summary(recipe, 8, H100, 64)
    assert not summary["fits"] and summary["nearest"] and "proposal" not in summary
    summary = device_summary(full_recipe(4096, 64, model=big_model()), 8, H100, 8)
    assert not summary["fits"] and summary["nearest"] is None and summary["nearest_gpus"] >= 16
    with pytest.raises(UserError, match="--world-size is 8; no layout fits that many .*, set --world-size (16|32)$"):
        device_summary(full_recipe(4096, 64, model=big_model()), 8, H100, 8, with_proposal=True)


def test_an_impossible_layout_is_refused_with_one_that_fits():
    recipe = full_recipe(4096, 64, parallel__tensor=3)
    with pytest.raises(UserError, match="is 20, not a multiple of parallel.tensor 3"):
        check_layout(recipe, 8, None, 8)
    expected = (
        "is 20, not a multiple of parallel.tensor 3; the nearest that fits 8 x NVIDIA H100 .*: parallel.tensor=4$"
    )
    with pytest.raises(UserError, match=expected):
        check_layout(recipe, 8, H100, 8)
    assert check_layout(recipe, 8, H100, 8, proposing=True).endswith("is 20, not a multiple of parallel.tensor 3")
    with pytest.raises(UserError, match="is 20, not a multiple of parallel.tensor 3"):
        check_layout(recipe, None, None, 8)
    with pytest.raises(UserError, match=r"for example --world-size 4; the nearest"):
        check_layout(full_recipe(4096, 64, parallel__tensor=4), 3, None, 8)
    recipe.optim.lr = -1.0  # no layout mends that
    for proposing in (False, True):
        with pytest.raises(UserError, match="optim.lr is -1.0; it must be greater than 0 and finite$"):
            check_layout(recipe, 8, H100, 8, proposing)


def test_a_proposal_does_not_need_a_layout_that_can_be(monkeypatch):
    monkeypatch.setattr(layouts, "WORLDS", (8,))
    recipe = full_recipe(4096, 64, parallel__tensor=3)
    summary = device_summary(recipe, 8, H100, 8, with_proposal=True, problem="tensor is 3")
    assert summary["problem"] == "tensor is 3" and "memory" not in summary
    assert "parallel.tensor=1" in summary["proposal"]["overrides"]


def test_time_is_told_with_and_without_tiles(monkeypatch):
    recipe = full_recipe(4096, 64)
    both, given = (device_summary(recipe, 8, H100, 20, with_text=text) for text in (True, False))
    assert both["tiles_per_pack"] == 20 and given["text"] is None
    text = device_summary(recipe, 8, H100, 0)
    assert both["text"] == {key: text[key] for key in ("tiles_per_pack", "step", "gpu_hours")}
    assert both["memory"] == given["memory"] and both["step"] == given["step"] != text["step"]


def test_a_larger_batch_is_told_beside_the_recipe_s(monkeypatch):
    monkeypatch.setattr(layouts, "WORLDS", (256,))
    summary = device_summary(full_recipe(4096, 16), 256, H100, 0, with_proposal=True, problem="too few packs")
    own, proposal = summary["own_batch"], summary["proposal"]
    assert own["global_batch_size"] == 16 < proposal["global_batch_size"]
    assert f"train.global_batch_size={proposal['global_batch_size']}" in proposal["overrides"]
    enough = device_summary(full_recipe(4096, 2048), 256, H100, 0, with_proposal=True)
    assert enough["own_batch"] is None and enough["proposal"]["global_batch_size"] == 2048


def test_fp8_needs_a_device_that_has_it():
    recipe = in_fp8(full_recipe(), Fp8Recipe.current)
    with pytest.raises(UserError, match="precision.fp8.recipe is current, which NVIDIA A100 80GB can't do; set precis"):
        device_summary(recipe, 1, DEVICES["a100"], 0)
    assert device_summary(recipe, 1, H100, 0)["memory"][0]["fp8"] > 0


def test_scaling(monkeypatch):
    assert layouts.WORLDS == (8, 16, 32, 64, 128, 256, 512, 1024)
    monkeypatch.setattr(layouts, "WORLDS", (8, 32, 256))  # it takes seconds for all
    recipe = full_recipe(4096, 64)
    rows = list(scaling(recipe, best(recipe, 16, H100, 8)))
    assert [gpus for gpus, _, _ in rows] == [8, 32, 256]
    assert rows[0][2] is None
    for gpus, same, grown in rows:
        check_recipe(same.recipe, gpus)
        assert same.fits and same.recipe.train.global_batch_size >= 64
        if grown:
            assert grown.recipe.train.global_batch_size == 64 * gpus // 16
            assert grown.estimate.mfu >= same.estimate.mfu * 0.9
    rates = [same.estimate.tokens_per_second for _, same, _ in rows]
    assert rates == sorted(rates)
    assert rows[-1][1].estimate.mfu < rows[0][1].estimate.mfu
    assert rows[-1][1].estimate.mfu > 0.85 * rows[-1][2].estimate.mfu  # not left with too few packs


def test_flops_summary():
    flops = flops_summary(full_recipe(4096, 64), 10)
    assert flops["per_text_token"] == pytest.approx(16.76e9, rel=1e-3)
    assert flops["per_token"] * 4096 == flops["pack"]["total"] > flops["per_text_token"] * 4096
    assert flops["run"] == 1000 * flops["per_step"] == 64000 * flops["pack"]["total"]
    assert flops["text"] is None
    text = flops_summary(full_recipe(4096, 64), 10, with_text=True)["text"]
    assert text["per_token"] == flops["per_text_token"] and text["run"] == 64000 * 4096 * text["per_token"]
