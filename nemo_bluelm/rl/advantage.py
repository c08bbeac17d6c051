"""Advantages of sampled responses from their rewards, by groups of responses to one prompt.

Rewards of a whole step come together here, from all ranks, because groups, tasks and batch are normalised as wholes.
Everything is computed in fp64, so that neither the order of the samples nor the device shows.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from nemo_bluelm.errors import UserError

ESTIMATORS = ("grpo", "rloo", "dr_grpo", "gdpo", "reinforce_pp", "reinforce_pp_baseline")
NORMALIZE = ("group", "batch", "task", "none")
ZERO_SPREAD = 1e-8

Ids = Tensor | Sequence[Hashable]


def group_advantages(
    rewards: Tensor,
    group_ids: Ids,
    estimator: str = "grpo",
    *,
    std_eps: float = 1e-6,
    normalize: str | None = None,
    leave_one_out: bool | None = None,
    scorable: Tensor | None = None,
    components: Tensor | None = None,
    weights: Sequence[float] | Tensor | None = None,
    tasks: Ids | None = None,
    lengths: Tensor | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
) -> Tensor:
    """Advantage of each sample.

    - ``grpo``: (r - mean of the group) / (std + std_eps); arXiv 2402.03300.
    - ``dr_grpo``: without the division; arXiv 2503.20783.
    - ``rloo``: r - mean of the group's other samples; arXiv 2402.14740.
    - ``gdpo``: each component as grpo by itself, their weighted sum, and that normalised over the batch;
      arXiv 2601.05242.
    - ``reinforce_pp``: normalised over the batch, no group mean; ``reinforce_pp_baseline``: over the batch, after the
      group's mean is taken off; arXiv 2501.03262.

    Where rewards don't differ nothing can be learned: by more than 1e-8 they must, in the group (reinforce_pp: in the
    batch), else the advantage is exactly 0, however the floats round. It is also 0 for a sample whose group has no
    other scorable one. A sample that could not be scored has advantage 0 and enters no mean and no std.

    Args:
        rewards: [N]; what is not finite is unscorable. gdpo takes ``components`` and looks here for that only.
        group_ids: N, equal within a group. Groups may differ in size and lie in any order.
        std_eps: added to every std (ddof 1).
        normalize: of grpo, dr_grpo and rloo, whose std divides the differences from the group's mean: that of the
            rewards in the ``group``, in the whole ``batch``, in the samples of the same ``task``, or ``none``.
            By default ``group`` for grpo and ``none`` for the two others.
        leave_one_out: whether the group's mean leaves out the sample itself (the std never does). By default only
            for rloo.
        scorable: bool [N]; False is unscorable.
        components: [N, K] of gdpo; where one is not finite, that component of the sample is left out.
        weights: [K] or [N, K] of gdpo, by default all 1; where it is 0 a component is left out.
        tasks: N, of ``normalize`` = ``task``.
        lengths: [N], the samples' tokens. Given, gdpo and reinforce_pp weigh samples by them when they normalise over
            the batch, as verl does; else samples count the same, as in TRL.
        clip_low, clip_high: bounds of the result, None for none.

    Returns:
        [N], of the rewards' type.

    Raises:
        UserError: unknown names, and what an estimator needs and was not given.
    """
    _check(estimator, normalize, components, tasks)
    groups, r = _numbered(group_ids, rewards.device), rewards.double()
    good = _scorable(r, scorable)
    if estimator == "gdpo":
        parts = components.double()
        shares = torch.ones_like(parts) if weights is None else torch.as_tensor(weights).to(parts).expand_as(parts)
        known = parts.isfinite() & good[:, None] & (shares > 0)
        good = known.any(1)
        total = torch.zeros_like(r)
        mixed = torch.zeros_like(good)
        for part, there, share in zip(parts.unbind(1), known.unbind(1), shares.unbind(1), strict=True):
            total += share * _over(_centred(part, groups, there), _std(part, groups, there), std_eps)
            mixed |= mixed_groups(part, groups, there)
        result = _whitened(total, good, lengths, std_eps) * mixed
    elif estimator == "reinforce_pp":
        result = _whitened(r, good, lengths, std_eps)
    elif estimator == "reinforce_pp_baseline":
        result = _whitened(_centred(r, groups, good), good, lengths, std_eps) * mixed_groups(r, groups, good)
    else:
        result = _centred(r, groups, good, estimator == "rloo" if leave_one_out is None else leave_one_out)
        normalize = normalize or ("group" if estimator == "grpo" else "none")
        if normalize != "none":
            scales = {"group": groups, "batch": torch.zeros_like(groups), "task": tasks}[normalize]
            result = _over(result, _std(r, _numbered(scales, rewards.device), good), std_eps)
    if clip_low is not None or clip_high is not None:
        result = result.clamp(clip_low, clip_high)
    return result.to(rewards.dtype)


def mixed_groups(rewards: Tensor, group_ids: Ids, scorable: Tensor | None = None) -> Tensor:
    """bool [N]: whether the scorable rewards of the sample's group differ, by more than 1e-8.

    Of the others nothing can be learned; dynamic sampling drops them.
    """
    groups, r = _numbered(group_ids, rewards.device), rewards.double()
    good = _scorable(r, scorable)
    lowest = r.new_full((len(r),), torch.inf).scatter_reduce(0, groups, r.where(good, torch.inf), "amin")
    highest = r.new_full((len(r),), -torch.inf).scatter_reduce(0, groups, r.where(good, -torch.inf), "amax")
    return (highest - lowest > ZERO_SPREAD)[groups]


def _centred(values: Tensor, groups: Tensor, good: Tensor, leave_one_out: bool = False) -> Tensor:
    """[N]: less the mean of the group's good values; exactly 0 where those don't differ, and for values not good."""
    count = _sums(good, groups)
    result = values - _sums(values.where(good, 0), groups) / count.clamp(min=1)
    if leave_one_out:
        result = result * (count / (count - 1).clamp(min=1))
    return result.where(good & mixed_groups(values, groups, good), 0)


def _std(values: Tensor, groups: Tensor, good: Tensor) -> Tensor:
    """[N]: the sample standard deviation (ddof 1) of the group's good values, 0 where there are less than two."""
    squares = _centred(values, groups, good).square()
    return (_sums(squares, groups) / (_sums(good, groups) - 1).clamp(min=1)).sqrt()


def _whitened(values: Tensor, good: Tensor, lengths: Tensor | None, std_eps: float) -> Tensor:
    """[N]: mean 0 and std 1 over the good values, each weighed by its length; all 0 where they don't differ."""
    mass = good.double() if lengths is None else lengths.double() * good
    total = mass.sum()
    centred = (values - (values.where(good, 0) * mass).sum() / total.clamp(min=1)).where(good, 0)
    std = ((mass * centred.square()).sum() / (total - 1).clamp(min=1)).sqrt()
    return _over(centred, std, std_eps) * mixed_groups(values, torch.zeros_like(good, dtype=torch.int64), good)


def _over(values: Tensor, std: Tensor, std_eps: float) -> Tensor:
    return values / (std + std_eps).where(std > 0, 1)  # where there is no std the values are 0, with std_eps = 0 too


def _sums(values: Tensor, groups: Tensor) -> Tensor:
    """fp64 [N]: to each sample the sum over its group."""
    return torch.zeros(len(groups), dtype=torch.float64, device=groups.device).index_add_(0, groups, values.double())[
        groups
    ]


def _scorable(rewards: Tensor, scorable: Tensor | None) -> Tensor:
    return rewards.isfinite() if scorable is None else rewards.isfinite() & scorable.bool()


def _numbered(ids: Ids, device: torch.device) -> Tensor:
    """int64 [N]: the ids as numbers from 0."""
    if isinstance(ids, Tensor):
        return ids.to(device).unique(return_inverse=True)[1]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(ids))}
    return torch.tensor([numbers[name] for name in ids], dtype=torch.int64, device=device)


def _check(estimator: str, normalize: str | None, components: Tensor | None, tasks: Ids | None) -> None:
    if estimator not in ESTIMATORS:
        raise UserError(f"advantage estimator {estimator!r} is unknown; it must be one of {', '.join(ESTIMATORS)}")
    if normalize is not None and normalize not in NORMALIZE:
        raise UserError(f"normalize {normalize!r} is unknown; it must be one of {', '.join(NORMALIZE)}")
    if normalize == "task" and tasks is None:
        raise UserError("normalize 'task' needs the samples' tasks; give them, or choose group, batch or none")
    if estimator == "gdpo" and components is None:
        raise UserError("gdpo needs the rewards' components; give them, or choose grpo")
