"""Changes to rewards and masks before advantages and losses: response length, and distance from the reference."""

from torch import Tensor

from nemo_bluelm.errors import UserError
from nemo_bluelm.rl.segments import Segments


def soft_overlong_punishment(lengths: Tensor, max_length: int, buffer_length: int, penalty: float = 1.0) -> Tensor:
    """What to add to the rewards of long responses: DAPO's equation 13 (arXiv 2503.14476).

    Args:
        lengths: [n], tokens of the responses.
        max_length: longer ones get ``-penalty``.
        buffer_length: over the last so many tokens before that, the punishment grows linearly from 0.

    Returns:
        fp64 [n], between -penalty and 0.

    Raises:
        UserError: a buffer longer than the longest response.
    """
    if not 0 <= buffer_length <= max_length:
        raise UserError(f"overlong buffer_length is {buffer_length}; it must be 0 to max_length ({max_length})")
    beyond = lengths.double() - (max_length - buffer_length)
    if buffer_length == 0:
        return -penalty * (beyond > 0).double()
    return -penalty * (beyond / buffer_length).clamp(0, 1)


def overlong_filter(mask: Tensor, truncated: Tensor, segments: Segments) -> Tensor:
    """[T]: the mask without the tokens of responses that were cut off at the length limit (``truncated``, bool [n]).

    They stay in the baseline of their group, but neither push the policy nor count in the normalizer.
    """
    return mask * ~segments.spread(truncated.bool())


def kl_in_reward(rewards: Tensor, kl: Tensor, mask: Tensor, segments: Segments, coefficient: float) -> Tensor:
    """[n]: rewards less the coefficient times the divergence summed over each response; no gradients.

    Args:
        rewards: [n], n at most ``segments.count``.
        kl: [T], of :func:`nemo_bluelm.rl.loss.kl_penalty`, of type k1 if the sum shall be unbiased.
    """
    total = segments.sum(kl.where(mask.bool(), 0))[: len(rewards)]
    return rewards - coefficient * total.to(rewards.dtype)
