"""Losses of policy optimisation on the tokens of a pack, as sums that add over micro-batches and ranks.

A mean per micro-batch would make gradients depend on how a step is cut into micro-batches and ranks. So every loss here
is a sum of the tokens at hand, each with the weight that the aggregation gives it, and one number divides it that is
known before the step: the tokens or sequences of the whole global batch.

All vectors are [T], fp32 or fp64, with a sequence number per token (:class:`nemo_bluelm.rl.segments.Segments`); padded
[B, T] tensors are the same after flattening. ``mask`` is 1 on tokens that the policy sampled (the end token too) and 0
on prompts, pads and tokens put in by force. What a masked place holds is never looked at, NaN included.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_bluelm.errors import UserError
from nemo_bluelm.rl.segments import Segments

POLICY_LOSSES = ("ppo_clip", "gspo", "cispo", "reinforce")
AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm")
KL_TYPES = ("k1", "k2", "k3")
MAX_LOG_RATIO = 20.0  # e^20 is 5e8: far outside of any clip range, and finite in every sum


class PolicyLoss(NamedTuple):
    """A policy loss and what its metrics need.

    Attributes:
        total: scalar with gradients, the weighted sum over tokens divided by the normalizer.
        ratio: [T], new over old probability of each token (ppo_clip, cispo, reinforce) or of its sequence, per token
            (gspo); no gradients, 1 where masked.
        clipped_low, clipped_high: bool [T], tokens whose ratio was below or above the clip range in the direction that
            the clip acts on: under ppo_clip and gspo, where the advantage pulls further out.
        capped: bool [T], tokens of the dual clip.
    """

    total: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    capped: Tensor


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    policy_loss: str = "ppo_clip",
    aggregation: str = "token_mean",
    clip_min: float = 0.2,
    clip_max: float = 0.2,
    clip_c: float | None = None,
    segments: Segments | None = None,
    max_length: int | None = None,
    weights: Tensor | None = None,
    normalizer: Tensor | float = 1.0,
) -> PolicyLoss:
    """The loss of the tokens at hand, r being ``exp(logp - old_logp)`` and A the advantage.

    - ``ppo_clip``: -min(r A, clip(r, 1 - clip_min, 1 + clip_max) A) (arXiv 1707.06347; unequal ends: arXiv 2503.14476).
      With ``clip_c`` and A < 0 it is at most -clip_c A, the dual clip (arXiv 1912.09729).
    - ``gspo``: the same with a sequence's geometric mean of r, whose gradient goes to each token (arXiv 2507.18071).
    - ``cispo``: -clip(r) A logp with no gradient through the clip (arXiv 2506.13585); no lower end: clip_min = 1.
    - ``reinforce``: -A logp.

    Args:
        logp: [T], log-probabilities of the tokens under the policy, with gradients.
        old_logp: [T], under the policy that the step began with; ``logp.detach()`` in the first update after it.
        advantages: [T], those of the token's sample.
        mask: [T], of any type.
        clip_min, clip_max: how far r may fall below and rise above 1.
        segments: needed by gspo and by aggregation over sequences.
        max_length: L of seq_mean_token_sum_norm, the longest response there may be.
        weights: [T], of :func:`nemo_bluelm.rl.correction.rollout_correction`, times each token's loss.
        normalizer: what the sum is divided by: :func:`normalizer_share`, summed over the whole global batch.
            Divide it by the ranks where gradients are averaged over them.

    Raises:
        UserError: unknown names, ``clip_c`` of at most 1 or with another loss.
    """
    _check_policy_loss(policy_loss, clip_c)
    keep = mask.bool()
    logp, old_logp, advantages = (values.where(keep, 0) for values in (logp, old_logp, advantages))
    log_ratio = logp - old_logp
    if policy_loss == "gspo":
        # The mean as a constant, times a ratio of 1 that carries the token's gradient: no gradient has to cross ranks.
        mean = _needed(segments, policy_loss).spread(segments.mean(log_ratio, mask)).to(log_ratio.dtype)
        log_ratio = (mean + (logp - logp.detach())).where(keep, 0)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - clip_min, 1 + clip_max)
    below, above, none = ratio < 1 - clip_min, ratio > 1 + clip_max, torch.zeros_like(keep)
    capped = none

    if policy_loss == "reinforce":
        losses, below, above = -advantages * logp, none, none
    elif policy_loss == "cispo":
        losses = -clipped.detach() * advantages * logp
    else:
        losses = torch.maximum(-advantages * ratio, -advantages * clipped)
        below, above = below & (advantages < 0), above & (advantages > 0)
        if clip_c is not None:
            capped = (advantages < 0) & (ratio > clip_c)
            losses = losses.where(advantages >= 0, torch.minimum(losses, -clip_c * advantages))
    if weights is not None:
        losses = losses * weights
    total = aggregate(losses, mask, aggregation, segments=segments, max_length=max_length) / normalizer
    return PolicyLoss(total, ratio.detach(), below, above, capped)


def aggregate(
    values: Tensor,
    mask: Tensor,
    aggregation: str = "token_mean",
    *,
    segments: Segments | None = None,
    max_length: int | None = None,
) -> Tensor:
    """The weighted sum of tokens that, over the summed :func:`normalizer_share`, is the mean asked for.

    - ``token_mean``: every token of the global batch counts the same.
    - ``seq_mean_token_mean``: every sequence counts the same, and within it every token.
    - ``seq_mean_token_sum_norm``: tokens are summed, over ``max_length``; sequences count the same (Dr. GRPO,
      arXiv 2503.20783).

    Args:
        values: [T] of losses, penalties or entropies.
        mask, segments, max_length: as for :func:`policy_loss`.

    Returns:
        A scalar; 0 where all is masked.
    """
    keep = mask.bool()
    return (values.where(keep, 0) * _token_weights(keep, aggregation, segments, max_length).to(values.dtype)).sum()


def normalizer_share(mask: Tensor, aggregation: str = "token_mean", *, segments: Segments | None = None) -> Tensor:
    """What the tokens at hand add to the number that divides the loss, fp64 scalar.

    The tokens, or the sequences with at least one: a sequence that lies on several context-parallel ranks counts on
    each by its share of the tokens, so that the sum over all micro-batches and ranks is right for every layout.
    """
    keep = mask.bool()
    _check_aggregation(aggregation)
    if aggregation != "token_mean":
        aggregation = "seq_mean_token_mean"  # its token weights sum up to 1 in every sequence
    return _token_weights(keep, aggregation, segments, None).sum()


def kl_penalty(logp: Tensor, ref_logp: Tensor, kl_type: str = "k3") -> Tensor:
    """Estimates of KL(policy || reference) from tokens that the policy sampled (joschu.net/blog/kl-approx.html).

    k1 is unbiased and may be negative; its gradient has mean zero, so it is of use in rewards only. k2 is biased, and
    its gradient is that of the divergence. k3 is unbiased and never negative.

    Args:
        logp, ref_logp: [T], finite.

    Returns:
        [T], with gradients to ``logp``.
    """
    if kl_type == "k1":
        return logp - ref_logp
    if kl_type == "k2":
        return 0.5 * (logp - ref_logp).square()
    if kl_type == "k3":
        # Only the end that overflows: a clamp at the other would stop the pull on a token that the reference never has.
        difference = (ref_logp - logp).clamp(max=MAX_LOG_RATIO)
        return difference.expm1() - difference
    raise UserError(f"KL type {kl_type!r} is unknown; it must be one of {', '.join(KL_TYPES)}")


def _token_weights(keep: Tensor, aggregation: str, segments: Segments | None, max_length: int | None) -> Tensor:
    """fp64 [T], 0 where masked."""
    _check_aggregation(aggregation)
    weights = keep.double()
    if aggregation == "seq_mean_token_mean":
        segments = _needed(segments, aggregation)
        return weights / segments.spread(segments.sum(keep).clamp(min=1))
    if aggregation == "seq_mean_token_sum_norm":
        if not max_length:
            raise UserError(f"{aggregation} needs the longest response's length; give max_length")
        return weights / max_length
    return weights


def _check_policy_loss(name: str, clip_c: float | None) -> None:
    if name not in POLICY_LOSSES:
        raise UserError(f"policy loss {name!r} is unknown; it must be one of {', '.join(POLICY_LOSSES)}")
    if clip_c is not None and clip_c <= 1:
        raise UserError(f"clip_c is {clip_c}; it must be above 1, or null for no dual clip")
    if clip_c is not None and name not in ("ppo_clip", "gspo"):
        raise UserError(f"clip_c is {clip_c}, but {name} has no dual clip; set it to null or choose ppo_clip or gspo")


def _check_aggregation(name: str) -> None:
    if name not in AGGREGATIONS:
        raise UserError(f"aggregation {name!r} is unknown; it must be one of {', '.join(AGGREGATIONS)}")


def _needed(segments: Segments | None, what: str) -> Segments:
    if segments is None:
        raise ValueError(f"{what} needs the tokens' sequences; give segments")
    return segments
