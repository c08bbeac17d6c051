"""Losses: gradients at every clip, divergences, layouts that change nothing, and what may not break a step."""

import math
from pathlib import Path

import pytest
import torch
from rl_batches import MAX_LENGTH, VARIANTS, Responses, loss_of, share
from rl_layout_worker import compute, parts
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_bluelm.errors import UserError
from nemo_bluelm.rl.advantage import group_advantages
from nemo_bluelm.rl.correction import rollout_correction
from nemo_bluelm.rl.loss import AGGREGATIONS, POLICY_LOSSES, aggregate, kl_penalty, normalizer_share, policy_loss
from nemo_bluelm.rl.metrics import Tally, add_mismatch, add_policy
from nemo_bluelm.rl.segments import Segments
from tests.runtime.processes import torchrun

OPTIONS = {"clip_min": 0.2, "clip_max": 0.28}


def one_token(ratio: float, advantage: float, **options):
    """Result and gradient by logp of a response of one token."""
    logp = torch.tensor([-1.0]).double().requires_grad_()
    result = policy_loss(
        logp,
        logp.detach() - math.log(ratio),
        torch.tensor([advantage]).double(),
        torch.ones(1),
        **OPTIONS | {"segments": Segments.of_lengths([1])} | options,
    )
    return result, torch.autograd.grad(result.total, logp)[0].item()


@pytest.mark.parametrize("name", ["ppo_clip", "gspo"])
@pytest.mark.parametrize(
    "ratio, advantage, clip_c, loss, learns",
    [
        (0.5, 2.0, None, -1.0, True),  # too rare and good: pulled back in
        (0.5, -2.0, None, 1.6, False),  # too rare and bad: enough
        (0.79, -2.0, None, 1.6, False),
        (0.81, -2.0, None, 1.62, True),
        (1.0, 2.0, None, -2.0, True),
        (1.0, -2.0, None, 2.0, True),
        (1.27, 2.0, None, -2.54, True),  # beyond 1.2, but not beyond 1.28
        (1.29, 2.0, None, -2.56, False),
        (4.0, 2.0, None, -2.56, False),  # too frequent and good: enough
        (4.0, -2.0, None, 8.0, True),  # too frequent and bad: pulled back in
        (4.0, -2.0, 3.0, 6.0, False),  # ... but not without end
        (2.9, -2.0, 3.0, 5.8, True),
        (4.0, 2.0, 3.0, -2.56, False),
        (0.5, -2.0, 3.0, 1.6, False),
        (0.5, 2.0, 3.0, -1.0, True),
        (4.0, 0.0, None, 0.0, False),
    ],
)
def test_clip(name, ratio, advantage, clip_c, loss, learns):
    result, gradient = one_token(ratio, advantage, policy_loss=name, clip_c=clip_c)
    assert result.total.item() == pytest.approx(loss, abs=1e-12)
    assert gradient == pytest.approx(-ratio * advantage if learns else 0.0, abs=1e-12)
    assert result.clipped_low.item() == (ratio < 0.8 and advantage < 0)
    assert result.clipped_high.item() == (ratio > 1.28 and advantage > 0)
    assert result.capped.item() == (clip_c is not None and ratio > clip_c and advantage < 0)


@pytest.mark.parametrize("ratio, weight", [(0.5, 0.8), (0.9, 0.9), (1.25, 1.25), (4.0, 1.28)])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_clips_the_weight_and_keeps_the_gradient(ratio, weight, advantage):
    result, gradient = one_token(ratio, advantage, policy_loss="cispo")
    assert gradient == pytest.approx(-weight * advantage)
    assert result.total.item() == pytest.approx(weight * advantage)  # logp is -1
    assert (result.clipped_low.item(), result.clipped_high.item()) == (ratio < 0.8, ratio > 1.28)


def test_reinforce_knows_no_ratio():
    for ratio in (0.1, 1.0, 10.0):
        result, gradient = one_token(ratio, 2.0, policy_loss="reinforce")
        assert (result.total.item(), gradient) == (2.0, -2.0)
        assert not result.clipped_low.item() and not result.clipped_high.item()


def test_gspo_clips_a_sequence_as_a_whole():
    """The second response's tokens are each out of range, their geometric mean is not; the third's is."""
    log_ratio = torch.tensor([0.1, -0.1, 1.0, -0.9, 2.0, 0.0]).double()
    old = torch.full((6,), -2.0).double()
    logp = (old + log_ratio).requires_grad_()
    options = {"policy_loss": "gspo", "segments": Segments.of_lengths([2, 2, 2])}
    result = policy_loss(logp, old, torch.ones(6).double(), torch.ones(6), **options)
    (gradient,) = torch.autograd.grad(result.total, logp)
    second = math.exp(0.05)
    torch.testing.assert_close(result.ratio, torch.tensor([1, 1, second, second, math.e, math.e]).double())
    torch.testing.assert_close(gradient, torch.tensor([-1, -1, -second, -second, 0, 0]).double())
    assert result.clipped_high.tolist() == [False] * 4 + [True] * 2


def test_gspo_gradient_is_that_of_the_sequence_ratio():
    """Against the derivative of the definition, taken by autograd through the mean."""
    batch = Responses.draw(0)
    _, gradient = loss_of_gspo(batch)
    logp = batch.logp.clone().requires_grad_()
    total = 0.0
    for i in range(batch.count):
        mine = (batch.ids == i) & batch.mask
        if mine.any():
            s = (logp - batch.old_logp)[mine].mean().exp()
            a = batch.advantages[mine][0]
            total = total - torch.minimum(s * a, s.clamp(0.8, 1.2) * a)
    (expected,) = torch.autograd.grad(total / 5, logp)
    torch.testing.assert_close(gradient, expected)


def loss_of_gspo(batch):
    logp = batch.logp.clone().requires_grad_()
    options = {"policy_loss": "gspo", "aggregation": "seq_mean_token_mean", "segments": batch.segments()}
    total = policy_loss(logp, batch.old_logp, batch.advantages, batch.mask, normalizer=5, **options).total
    return total, torch.autograd.grad(total, logp)[0]


def test_aggregations_by_hand():
    values = torch.tensor([1.0, torch.nan, 3, 10, 20, -torch.inf]).double()
    mask = torch.tensor([1, 0, 1, 1, 1, 0])
    segments = Segments.of_lengths([3, 2, 1])
    options = {"segments": segments, "max_length": 4}
    sums = [aggregate(values, mask, name, **options).item() for name in AGGREGATIONS]
    assert sums == pytest.approx([34, 2 + 15, 34 / 4])
    counts = [normalizer_share(mask, name, segments=segments).item() for name in AGGREGATIONS]
    assert counts == pytest.approx([4, 2, 2])


# ---- divergence


def test_kl_estimators_in_expectation():
    """Over all outcomes: k1 and k3 are the divergence, and k2's gradient is its gradient."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator).double().requires_grad_()
    reference = torch.randn(6, generator=generator).double().log_softmax(0)
    logp = logits.log_softmax(0)
    exact = (logp.exp() * (logp - reference)).sum()
    means = {name: (logp.exp().detach() * kl_penalty(logp, reference, name)).sum() for name in ("k1", "k2", "k3")}
    assert means["k1"].item() == pytest.approx(exact.item())
    assert means["k3"].item() == pytest.approx(exact.item())
    gradients = {name: torch.autograd.grad(mean, logits, retain_graph=True)[0] for name, mean in means.items()}
    torch.testing.assert_close(gradients["k2"], torch.autograd.grad(exact, logits, retain_graph=True)[0])
    torch.testing.assert_close(gradients["k1"], torch.zeros(6).double(), rtol=0, atol=1e-12)


def test_kl_estimators_on_samples():
    generator = torch.Generator().manual_seed(0)
    logp, reference = (torch.randn(6, generator=generator).double().log_softmax(0) for _ in range(2))
    exact = (logp.exp() * (logp - reference)).sum().item()
    drawn = torch.multinomial(logp.exp(), 100_000, replacement=True, generator=generator)
    k1, k3 = (kl_penalty(logp[drawn], reference[drawn], name) for name in ("k1", "k3"))
    for values in (k1, k3):
        assert abs(values.mean().item() - exact) < 4 * values.std().item() / len(drawn) ** 0.5
    assert k3.std() < k1.std() and k3.min() >= 0


@pytest.mark.parametrize("difference", [-1000.0, -30.0, 30.0, 1000.0])
def test_k3_far_away(difference):
    """Finite, and a token that the reference all but excludes is still pushed down."""
    logp = torch.tensor([0.0]).requires_grad_()
    penalty = kl_penalty(logp, torch.tensor([difference]), "k3")
    (gradient,) = torch.autograd.grad(penalty.sum(), logp)
    assert penalty.isfinite() and gradient.isfinite()
    assert difference > 0 or gradient.item() == 1.0


# ---- layouts


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: " ".join(map(str, variant.values())))
@pytest.mark.parametrize("seed", range(6))
def test_layouts_change_nothing(variant, aggregation, seed):
    """Responses dealt out over micro-batches, in any order, their tokens mixed, with pads full of NaN."""
    whole = Responses.draw(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    normalizer = share(whole, aggregation)
    loss, gradient = loss_of(whole, variant, aggregation, normalizer)
    owner = torch.randint(0, 3, (whole.count,), generator=generator)
    total, found, shares = 0.0, torch.zeros_like(gradient), 0.0
    for micro_batch in range(3):
        places = torch.cat(((owner[whole.ids] == micro_batch).nonzero()[:, 0], torch.full((4,), -1)))
        places = places[torch.randperm(len(places), generator=generator)]
        part = whole.take(places)
        shares += share(part, aggregation).item()
        some, gradients = loss_of(part, variant, aggregation, normalizer)
        assert not gradients[places < 0].any()
        total += some.item()
        found[places[places >= 0]] += gradients[places >= 0]
    assert shares == pytest.approx(normalizer.item(), abs=1e-12)
    assert total == pytest.approx(loss.item(), abs=1e-12)
    torch.testing.assert_close(found, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_averaging_ranks_divide_the_normalizer(aggregation):
    whole = Responses.draw(1)
    normalizer = share(whole, aggregation)
    loss, gradient = loss_of(whole, VARIANTS[0], aggregation, normalizer)
    total, found = 0.0, torch.zeros_like(gradient)
    for rank in range(2):
        places = (whole.ids % 2 == rank).nonzero()[:, 0]
        some, gradients = loss_of(whole.take(places), VARIANTS[0], aggregation, normalizer / 2)
        total += some.item() / 2
        found[places] = gradients / 2
    assert total == pytest.approx(loss.item(), abs=1e-12)
    torch.testing.assert_close(found, gradient, rtol=0, atol=1e-12)


def test_two_ranks(tmp_path):
    """Every response cut over two context-parallel ranks, and responses dealt out over two data-parallel ones."""
    torchrun(2, Path(__file__).with_name("rl_layout_worker.py"), tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    whole = Responses.draw(3)
    losses, figures, weights = compute(whole, torch.arange(len(whole.ids)), None, False)
    for layout, places in parts(whole, 2).items():
        for case, (loss, gradient) in losses.items():
            total = sum(rank[layout][0][case][0].item() for rank in ranks)
            assert total == pytest.approx(loss.item(), abs=1e-12), (layout, case)
            for rank, mine in zip(ranks, places):
                found = rank[layout][0][case][1]
                torch.testing.assert_close(found[:-3], gradient[mine[:-3]], rtol=0, atol=1e-12)
        for rank, mine in zip(ranks, places):
            assert rank[layout][1] == pytest.approx(figures, abs=1e-12), layout
            torch.testing.assert_close(rank[layout][2]["weights"][:-3], weights["weights"][mine[:-3]])


# ---- steps that must not break


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("filler", [0.0, torch.nan, -torch.inf])
def test_nothing_to_learn_from(name, aggregation, filler):
    logp = torch.full((5,), filler).requires_grad_()
    options = {"segments": Segments.of_lengths([2, 3]), "max_length": 9}
    values = torch.full((5,), filler)
    result = policy_loss(
        logp, values, values, torch.zeros(5), policy_loss=name, aggregation=aggregation, weights=values, **options
    )
    result.total.backward()
    assert result.total.item() == 0
    assert logp.grad.tolist() == [0.0] * 5
    assert normalizer_share(torch.zeros(5), aggregation, segments=options["segments"]).item() == 0


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_zero_advantages_give_zero_gradients(name):
    batch = Responses.draw(0)
    logp = batch.logp.clone().requires_grad_()
    options = {"policy_loss": name, "segments": batch.segments()}
    policy_loss(logp, batch.old_logp, torch.zeros_like(logp), batch.mask, **options).total.backward()
    assert not logp.grad.any()


@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "cispo"])
@pytest.mark.parametrize("difference", [-2000.0, 2000.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_ratios_stay_finite(name, difference, advantage):
    logp = torch.tensor([-1.0, -1.0]).requires_grad_()
    options = {"policy_loss": name, "segments": Segments.of_lengths([2])}
    result = policy_loss(logp, logp.detach() - difference, torch.full((2,), advantage), torch.ones(2), **options)
    result.total.backward()
    assert result.total.isfinite() and logp.grad.isfinite().all()


class NoSync(TorchDispatchMode):
    """Fails at what would make the host wait for a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "unique", "masked_select")), name
        assert name != "aten.index.Tensor" or all(i is None or i.dtype != torch.bool for i in args[1]), name
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_host_never_waits(aggregation):
    batch = Responses.draw(0, dtype=torch.float32)
    segments, normalizer, tally = batch.segments(), torch.tensor(7.0), Tally()
    with NoSync():
        for variant in VARIANTS:
            correction = rollout_correction(
                batch.old_logp, batch.ref_logp, batch.mask, "seq_mask_tis", segments=segments
            )
            logp = batch.logp.clone().requires_grad_()
            options = {"aggregation": aggregation, "segments": segments, "max_length": MAX_LENGTH}
            result = policy_loss(
                logp,
                batch.old_logp,
                batch.advantages,
                batch.mask,
                weights=correction.weights,
                normalizer=normalizer,
                **options | variant,
            )
            result.total.backward()
            add_policy(tally, result, logp, batch.old_logp, batch.mask, segments=segments, ref_logp=batch.ref_logp)
            add_mismatch(tally, batch.old_logp, batch.ref_logp, batch.mask, correction)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        tally.results()["policy/loss"], torch.ones(1).item()


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_bandit(name):
    """Fifty steps make the one rewarded token likely; a KL penalty keeps the policy near its start."""

    def train(coefficient: float) -> float:
        generator = torch.Generator().manual_seed(0)
        logits = torch.zeros(8, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.1)
        reference = torch.zeros(8).log_softmax(0)
        for _ in range(50):
            drawn = torch.multinomial(logits.softmax(0).detach(), 32, replacement=True, generator=generator)
            advantages = group_advantages((drawn == 3).float(), torch.arange(32) // 16)
            logp, mask = logits.log_softmax(0)[drawn], torch.ones(32)
            options = {"policy_loss": name, "segments": Segments.of_lengths([1] * 32), "normalizer": 32}
            loss = policy_loss(logp, logp.detach(), advantages, mask, **options).total
            loss = loss + coefficient * aggregate(kl_penalty(logp, reference[drawn]), mask) / 32
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return logits.softmax(0)[3].item()

    assert train(0.0) > 0.8
    assert 0.125 < train(5.0) < 0.5


@pytest.mark.parametrize(
    "options, words",
    [
        ({"policy_loss": "ppo"}, "policy loss 'ppo' is unknown"),
        ({"aggregation": "mean"}, "aggregation 'mean' is unknown"),
        ({"clip_c": 1.0}, "must be above 1"),
        ({"clip_c": 3.0, "policy_loss": "cispo"}, "cispo has no dual clip"),
        ({"aggregation": "seq_mean_token_sum_norm"}, "give max_length"),
    ],
)
def test_mistakes(options, words):
    with pytest.raises(UserError, match=words):
        one_token(1.0, 1.0, **options)
    with pytest.raises(UserError, match="KL type"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "abs")


def test_sequences_are_asked_for():
    for options in ({"policy_loss": "gspo"}, {"aggregation": "seq_mean_token_mean"}):
        with pytest.raises(ValueError, match="give segments"):
            one_token(1.0, 1.0, **options, segments=None)
