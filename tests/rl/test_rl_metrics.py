"""Figures of a step: right numbers, whatever the micro-batches; two ranks are tested beside the losses."""

import math

import pytest
import torch
from rl_batches import Responses

from nemo_bluelm.rl.correction import rollout_correction
from nemo_bluelm.rl.loss import policy_loss
from nemo_bluelm.rl.metrics import Tally, add_advantages, add_mismatch, add_policy

NAMES = {
    *("policy/loss", "policy/ratio_mean", "policy/ratio_min", "policy/ratio_max", "policy/approx_kl"),
    *("policy/clip_frac_low", "policy/clip_frac_high", "policy/clip_frac_dual", "policy/entropy", "kl/ref"),
    *("num_valid_tokens", "num_valid_samples"),
    *("mismatch/token_mult_prob_error", "mismatch/gen_kl_error"),
    *("mismatch/sampling_importance_ratio", "mismatch/is_oob_ratio", "mismatch/nan_rate"),
    *("advantages/mean", "advantages/std", "advantages/min", "advantages/max"),
}


def add_all(tally: Tally, part: Responses) -> None:
    loss = policy_loss(part.logp, part.old_logp, part.advantages, part.mask, normalizer=7.0)
    correction = rollout_correction(part.old_logp, part.ref_logp, part.mask, "icepop", lower=0.8, upper=1.2)
    options = {"segments": part.segments(), "ref_logp": part.ref_logp, "entropy": part.weights}
    add_policy(tally, loss, part.logp, part.old_logp, part.mask, **options)
    add_mismatch(tally, part.old_logp, part.ref_logp, part.mask, correction)
    add_advantages(tally, part.advantages, part.mask)


@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_change_nothing(seed):
    whole, together, apart = Responses.draw(seed), Tally(), Tally()
    add_all(together, whole)
    for micro_batch in range(4):  # the third response is all masked, and the last micro-batch empty but for pads
        places = (whole.ids % 3 == micro_batch).nonzero()[:, 0]
        add_all(apart, whole.take(torch.cat((torch.tensor([-1]), places))))
    assert together.results().keys() == NAMES
    assert apart.results() == pytest.approx(together.results(), abs=1e-12)


def test_figures_are_those_of_the_tokens():
    batch, tally = Responses.draw(0), Tally()
    add_all(tally, batch)
    figures = tally.results()
    keep = batch.mask
    ratio = (batch.logp - batch.old_logp)[keep].exp()
    mismatch = (batch.old_logp - batch.ref_logp)[keep]
    expected = {
        "policy/ratio_mean": ratio.mean(),
        "policy/ratio_min": ratio.min(),
        "policy/ratio_max": ratio.max(),
        "policy/approx_kl": (batch.old_logp - batch.logp)[keep].mean(),
        "num_valid_tokens": keep.sum(),
        "num_valid_samples": len(batch.ids[keep].unique()),
        "policy/entropy": batch.weights[keep].mean(),
        "mismatch/token_mult_prob_error": mismatch.abs().exp().mean(),
        "mismatch/gen_kl_error": (mismatch.exp() - mismatch - 1).mean(),
        "mismatch/sampling_importance_ratio": mismatch.exp().mean(),
        "mismatch/is_oob_ratio": ((mismatch.exp() < 0.8) | (mismatch.exp() > 1.2)).double().mean(),
        "advantages/mean": batch.advantages[keep].mean(),
        "advantages/std": batch.advantages[keep].std(),
        "advantages/min": batch.advantages[keep].min(),
        "advantages/max": batch.advantages[keep].max(),
    }
    assert {name: figures[name] for name in expected} == pytest.approx({k: float(v) for k, v in expected.items()})


def test_equal_engines_show_no_mismatch():
    logp, mask, tally = torch.tensor([-1.0, -2.0]), torch.ones(2), Tally()
    add_mismatch(tally, logp, logp, mask, rollout_correction(logp, logp, mask))
    assert tally.results() == {
        "mismatch/token_mult_prob_error": 1.0,
        "mismatch/gen_kl_error": 0.0,
        "mismatch/sampling_importance_ratio": 1.0,
        "mismatch/is_oob_ratio": 0.0,
        "mismatch/nan_rate": 0.0,
    }


def test_nothing_is_told_of_nothing():
    tally = Tally()
    assert tally.results() == {}
    tally.describe("x/", torch.full((3,), math.nan), torch.zeros(3))
    tally.describe("x/", torch.zeros(0), torch.zeros(0))
    assert tally.results() == {}
    tally.describe("x/", torch.tensor([2.0, math.nan]), torch.tensor([1, 0]))
    assert tally.results() == {"x/mean": 2.0, "x/min": 2.0, "x/max": 2.0}


def test_tokens_that_the_engine_knows_nothing_of_are_told_and_left_out():
    old, tally = torch.tensor([-1.0, -2.0, -3.0, -4.0]), Tally()
    sampled, mask = torch.tensor([-1.5, math.nan, math.nan, -4.0]), torch.tensor([True, True, True, False])
    add_mismatch(tally, old, sampled, mask, rollout_correction(old, sampled, mask))
    figures = tally.results()
    assert figures["mismatch/nan_rate"] == pytest.approx(2 / 3)
    assert figures["mismatch/token_mult_prob_error"] == pytest.approx(math.exp(0.5))
    nothing = Tally()
    add_mismatch(nothing, old, torch.full_like(old, math.nan), mask)
    assert nothing.results() == {"mismatch/nan_rate": 1.0}
