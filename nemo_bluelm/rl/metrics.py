"""Figures of a GRPO step under the names that users of NeMo-RL, verl and TRL look for, exact for every layout."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from nemo_bluelm.rl.correction import Correction, log_mismatch
from nemo_bluelm.rl.loss import MAX_LOG_RATIO, PolicyLoss, kl_penalty, normalizer_share
from nemo_bluelm.rl.segments import Segments

STATISTICS = ("mean", "std", "min", "max")


class Tally:
    """Totals, means, deviations and extremes by name, gathered over micro-batches and ranks.

    Adding never waits for a GPU; :meth:`results` does, once.
    """

    def __init__(self):
        self._moments: dict[str, Tensor] = {}  # fp64 [3]: count, sum, sum of squares
        self._highest: dict[str, Tensor] = {}  # fp64 [2]: of the values and of the negated values
        self._names: dict[str, tuple[str, str]] = {}  # by the name of a result, what it is and of which values

    def total(self, name: str, value: Tensor) -> None:
        """Add to a sum, such as a loss already divided by its normalizer."""
        self._add(name, value.detach().reshape(1), torch.ones(1, device=value.device), {name: "total"})

    def mean(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Add values [n] to a mean over those not masked."""
        self._add(name, values, mask, {name: "mean"})

    def describe(self, prefix: str, values: Tensor, mask: Tensor, statistics: Sequence[str] = STATISTICS) -> None:
        """Add values [n] to statistics named ``prefix`` + "mean", "std" (ddof 1), "min" and "max"."""
        self._add(prefix, values, mask, {prefix + statistic: statistic for statistic in statistics})

    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        """Put together what the ranks of a group hold, all with the same names; data and context parallel ones."""
        for held, operation in ((self._moments, ReduceOp.SUM), (self._highest, ReduceOp.MAX)):
            if held:
                everything = torch.stack([held[name] for name in sorted(held)])
                torch.distributed.all_reduce(everything, op=operation, group=group)
                held.update(zip(sorted(held), everything))

    def results(self) -> dict[str, float]:
        """All figures; without those of which there was nothing to tell."""
        if not self._names:
            return {}
        rows = torch.cat((torch.stack(list(self._moments.values())), torch.stack(list(self._highest.values()))), 1)
        held = dict(zip(self._moments, rows.tolist()))
        figures = {}
        for name, (statistic, source) in self._names.items():
            count, total, squares, highest, minus_lowest = held[source]
            if count < (2 if statistic == "std" else 1):
                continue
            mean = total / count
            figures[name] = {
                "total": total,
                "mean": mean,
                "std": max(0.0, (squares - count * mean**2) / max(1, count - 1)) ** 0.5,
                "min": -minus_lowest,
                "max": highest,
            }[statistic]
        return figures

    def _add(self, source: str, values: Tensor, mask: Tensor, names: dict[str, str]) -> None:
        keep = mask.bool()
        kept = values.detach().double().where(keep, 0)
        moments = torch.stack((keep.sum().double(), kept.sum(), kept.square().sum()))
        ends = torch.stack((kept, -kept)).where(keep, -torch.inf)
        ends = torch.cat((ends, ends.new_full((2, 1), -torch.inf)), 1).amax(1)  # one more, where there are no values
        self._names |= {name: (statistic, source) for name, statistic in names.items()}
        if source in self._moments:
            moments, ends = self._moments[source] + moments, torch.maximum(self._highest[source], ends)
        self._moments[source], self._highest[source] = moments, ends


def add_policy(
    tally: Tally,
    loss: PolicyLoss,
    logp: Tensor,
    old_logp: Tensor,
    mask: Tensor,
    *,
    segments: Segments | None = None,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
) -> None:
    """policy/* and kl/ref of a micro-batch, [T] each.

    ``policy/approx_kl`` is k1 of old against new (verl's ppo_kl), ``kl/ref`` k3 against the reference.
    """
    tally.total("policy/loss", loss.total)
    tally.describe("policy/ratio_", loss.ratio, mask, ("mean", "min", "max"))
    tally.mean("policy/clip_frac_low", loss.clipped_low, mask)
    tally.mean("policy/clip_frac_high", loss.clipped_high, mask)
    tally.mean("policy/clip_frac_dual", loss.capped, mask)
    tally.mean("policy/approx_kl", (old_logp - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), mask)
    tally.total("num_valid_tokens", mask.bool().sum())
    if segments is not None:
        tally.total("num_valid_samples", normalizer_share(mask, "seq_mean_token_mean", segments=segments))
    if ref_logp is not None:
        tally.mean("kl/ref", kl_penalty(logp, ref_logp, "k3"), mask)
    if entropy is not None:
        tally.mean("policy/entropy", entropy, mask)


def add_mismatch(
    tally: Tally, old_logp: Tensor, rollout_logp: Tensor, mask: Tensor, correction: Correction | None = None
) -> None:
    """mismatch/* of a micro-batch: how far the rollout engine's log-probabilities are from the training graph's.

    ``token_mult_prob_error`` is the mean of exp|difference| (healthy below 1.02), ``gen_kl_error`` k3 of rollout
    against training (below 1e-3), ``sampling_importance_ratio`` the mean importance weight before any correction
    (about 1), ``is_oob_ratio`` the share of tokens out of the correction's bounds. Tokens that the engine gave no
    log-probability of are left out; ``nan_rate`` is their share.
    """
    tally.mean("mismatch/nan_rate", rollout_logp.isnan(), mask)
    known = mask.bool() & ~rollout_logp.isnan()
    difference = log_mismatch(old_logp, rollout_logp, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    tally.mean("mismatch/token_mult_prob_error", difference.abs().exp(), known)
    tally.mean("mismatch/gen_kl_error", kl_penalty(-difference, 0 * difference, "k3"), known)
    tally.mean("mismatch/sampling_importance_ratio", difference.exp(), known)
    if correction is not None:
        tally.mean("mismatch/is_oob_ratio", correction.out_of_bounds, known)


def add_advantages(tally: Tally, advantages: Tensor, scorable: Tensor) -> None:
    """advantages/mean, std, min, max over the samples that could be scored, [N] each."""
    tally.describe("advantages/", advantages, scorable)
