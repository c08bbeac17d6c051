"""GRPO's losses, gradients, advantages and corrections are TRL's and verl's.

The golden file holds what they computed; with both installed, ``-m long`` asks them anew, on further batches.
"""

import json
from pathlib import Path

import pytest
import torch

from nemo_bluelm.rl.advantage import group_advantages
from nemo_bluelm.rl.correction import rollout_correction
from nemo_bluelm.rl.loss import aggregate, kl_penalty, normalizer_share, policy_loss
from nemo_bluelm.rl.metrics import Tally, add_mismatch, add_policy
from nemo_bluelm.rl.segments import Segments
from nemo_bluelm.rl.shaping import kl_in_reward, soft_overlong_punishment

GOLDEN = json.loads(Path(__file__).with_name("rl_golden.json").read_text())
TOLERANCE = 1e-6


def tensor(values) -> torch.Tensor:
    return torch.tensor([[float("nan") if x is None else x for x in row] for row in values]).double()


def vector(values) -> torch.Tensor:
    return tensor([values])[0]


class Batch:
    """A padded batch, flattened: the layout that the library knows."""

    def __init__(self, values: dict, rows: slice = slice(None)):
        tensors = {name: (vector if name == "advantages" else tensor)(value) for name, value in values.items()}
        self.samples = tensors["advantages"][rows]
        count, length = tensors["mask"][rows].shape
        self.segments = Segments.of_lengths([length] * count)
        tensors["advantages"] = tensors["advantages"][:, None].expand(-1, length)
        self.tokens = {name: value[rows].flatten() for name, value in tensors.items()}

    def __getattr__(self, name: str) -> torch.Tensor:
        return self.tokens[name]


def ours_loss(values, options, normalizer):
    batch = Batch(values)
    kl_coefficient = options.pop("kl_coefficient", 0.0)
    logp = batch.logp.clone().requires_grad_()
    aggregation = options.setdefault("aggregation", "token_mean")
    shared = {"segments": batch.segments, "max_length": len(values["mask"][0])}
    if normalizer is None:
        normalizer = normalizer_share(batch.mask, aggregation, segments=batch.segments)
    weights = batch.weights if options.pop("weights", False) else None
    result = policy_loss(
        logp, batch.old_logp, batch.advantages, batch.mask, weights=weights, normalizer=normalizer, **shared, **options
    )
    loss = result.total
    if kl_coefficient:
        penalty = kl_penalty(logp, batch.ref_logp, "k3")
        loss = loss + kl_coefficient * aggregate(penalty, batch.mask, aggregation, **shared) / normalizer
    (gradient,) = torch.autograd.grad(loss, logp)
    tally = Tally()
    add_policy(tally, result, logp, batch.old_logp, batch.mask, ref_logp=batch.ref_logp, entropy=batch.entropy)
    figures = tally.results()
    figures["clip_frac"] = figures["policy/clip_frac_low"] + figures["policy/clip_frac_high"]
    return {"loss": loss, "gradient": gradient, **figures}


def ours_rank(values, options, normalizer):
    whole, part = Batch(values), Batch(values, slice(*options["rows"]))
    aggregation = options["aggregation"]
    total = aggregate(part.weights, part.mask, aggregation, segments=part.segments, max_length=len(values["mask"][0]))
    return {"loss": total / (normalizer_share(whole.mask, aggregation, segments=whole.segments) / 2)}


def ours_kl(values, options, normalizer):
    batch = Batch(values)
    logp = batch.logp.clone().requires_grad_()
    penalty = kl_penalty(logp, batch.ref_logp, **options)
    return {"penalty": penalty, "gradient": torch.autograd.grad(penalty.sum(), logp)[0]}


def ours_correction(values, options, normalizer):
    batch = Batch(values)
    result = rollout_correction(batch.old_logp, batch.rollout_logp, batch.mask, segments=batch.segments, **options)
    tally = Tally()
    add_mismatch(tally, batch.old_logp, batch.rollout_logp, batch.mask, result)
    return {"weights": result.weights, **tally.results()}


def ours_advantage(inputs, options, normalizer):
    components = tensor(inputs["components"]) if "components" in inputs else None
    rewards = vector(inputs["rewards"]) if "rewards" in inputs else components.nansum(1)
    if "lengths" in options:
        options["lengths"] = torch.tensor(options["lengths"])
    group_ids = torch.tensor(inputs["group_ids"])
    return {"advantages": group_advantages(rewards, group_ids, components=components, **options)}


def ours_overlong(values, options, normalizer):
    return {"punishment": soft_overlong_punishment(torch.tensor(options.pop("lengths")), **options)}


def ours_reward_kl(values, options, normalizer):
    batch = Batch(values)
    penalty = kl_penalty(batch.logp, batch.ref_logp, "k1")
    return {"rewards": kl_in_reward(batch.samples, penalty, batch.mask, batch.segments, **options)}


OURS = {
    "loss": ours_loss,
    "rank": ours_rank,
    "kl": ours_kl,
    "correction": ours_correction,
    "advantage": ours_advantage,
    "overlong": ours_overlong,
    "reward kl": ours_reward_kl,
}


def check(case: dict, batch: dict) -> None:
    """All that the oracle tells of the case is what this project computes."""
    ours = OURS[case["kind"]](case.get("inputs", batch), dict(case["options"]), case["normalizer"])
    for name, expected in case["expected"].items():
        expected = torch.tensor(expected, dtype=torch.float64).flatten()
        got = torch.as_tensor(ours[name], dtype=torch.float64).detach().flatten()
        error = (got - expected).abs().max().item()
        assert error <= case.get("tolerance", TOLERANCE), f"{case['name']}: {name} is off by {error:.1e}"


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=[case["name"] for case in GOLDEN["cases"]])
def test_as_recorded(case):
    check(case, GOLDEN["batch"])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_as_computed_now(seed):
    pytest.importorskip("trl", reason="needs trl==1.16.0")
    pytest.importorskip("verl", reason="needs verl==0.9.1")
    import rl_oracle

    wanted = {name: GOLDEN["versions"][name] for name in ("trl", "verl")}
    assert {name: rl_oracle.versions()[name] for name in wanted} == wanted
    now = rl_oracle.record(seed)
    if seed == GOLDEN["seed"]:
        assert now["batch"] == GOLDEN["batch"]
    for case in now["cases"]:
        check(case, now["batch"])
