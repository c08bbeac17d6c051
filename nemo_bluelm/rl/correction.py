"""Weights that make up for rollouts sampled under other probabilities than the training graph computes."""

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_bluelm.errors import UserError
from nemo_bluelm.rl.loss import MAX_LOG_RATIO
from nemo_bluelm.rl.segments import Segments

CORRECTIONS = ("none", "tis", "icepop", "seq_mask_tis")


class Correction(NamedTuple):
    """Attributes: weights: [T], of each token's loss, no gradients; out_of_bounds: bool [T], where w was outside."""

    weights: Tensor
    out_of_bounds: Tensor


def rollout_correction(
    old_logp: Tensor,
    rollout_logp: Tensor,
    mask: Tensor,
    correction: str = "tis",
    *,
    upper: float = 2.0,
    lower: float = 0.0,
    segments: Segments | None = None,
) -> Correction:
    """Importance weights w = exp(old_logp - rollout_logp) of tokens, kept within bounds.

    - ``none``: 1 everywhere; out of bounds is still told.
    - ``tis``: w cut off at the bounds (truncated importance sampling).
    - ``icepop``: w, but 0 outside of the bounds.
    - ``seq_mask_tis``: w, but 0 in sequences whose geometric mean of w is outside of the bounds; it needs ``segments``
      and narrow bounds such as 0.999 and 1.002.

    Args:
        old_logp: [T], by the training graph, before the step's first update.
        rollout_logp: [T], by the engine that sampled. NaN, which engines give for tokens they have no value of,
            weighs 1.
        mask: [T]; weights are 0 where it is.

    Raises:
        UserError: an unknown correction; bounds the wrong way round.
    """
    if correction not in CORRECTIONS:
        raise UserError(f"rollout correction {correction!r} is unknown; it must be one of {', '.join(CORRECTIONS)}")
    if not 0 <= lower < upper:
        raise UserError(f"rollout correction keeps weights between {lower} and {upper}; give 0 <= lower < upper")
    keep = mask.bool()
    log_ratio = log_mismatch(old_logp, rollout_logp, mask)
    weights = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    judged = weights
    if correction == "seq_mask_tis":
        if segments is None:
            raise ValueError("seq_mask_tis needs the tokens' sequences; give segments")
        judged = segments.spread(segments.mean(log_ratio, mask).exp())
    outside = ((judged < lower) | (judged > upper)) & keep
    if correction == "none":
        weights = torch.ones_like(weights)
    elif correction == "tis":
        weights = weights.clamp(lower, upper)
    else:
        weights = weights.where(~outside, 0)
    return Correction(weights.where(keep, 0), outside)


def log_mismatch(old_logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> Tensor:
    """[T]: old_logp - rollout_logp without gradients, 0 where masked or where the engine gave NaN."""
    return (old_logp - rollout_logp).detach().where(mask.bool() & ~rollout_logp.isnan(), 0)
