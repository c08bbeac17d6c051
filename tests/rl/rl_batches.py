"""Random batches of responses, and ways to lay them out that may change nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_bluelm.rl.loss import aggregate, kl_penalty, normalizer_share, policy_loss
from nemo_bluelm.rl.segments import Segments

MAX_LENGTH = 9
VARIANTS = [
    {"policy_loss": "ppo_clip", "clip_max": 0.28},
    {"policy_loss": "ppo_clip", "clip_c": 1.5},
    {"policy_loss": "gspo"},
    {"policy_loss": "cispo", "clip_max": 0.28},
    {"policy_loss": "reinforce"},
]


@dataclass
class Responses:
    """Vectors [T] of all tokens of n responses, one after another."""

    logp: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    advantages: Tensor
    mask: Tensor
    weights: Tensor
    ids: Tensor
    count: int

    @classmethod
    def draw(cls, seed: int, count: int = 8, dtype: torch.dtype = torch.float64) -> "Responses":
        """Responses of 1 to 9 tokens, some of them masked, the third wholly."""
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, MAX_LENGTH + 1, (count,), generator=generator)
        ids = torch.repeat_interleave(torch.arange(count), lengths)
        noise = torch.randn(5, len(ids), generator=generator, dtype=torch.float64)
        logp = -noise[0].abs()
        mask = (torch.rand(len(ids), generator=generator) < 0.8) & (ids != 2)
        advantages = torch.randn(count, generator=generator, dtype=torch.float64)[ids]
        vectors = (logp, logp + 0.4 * noise[1], logp + 0.3 * noise[2], advantages, mask, noise[3].abs())
        return cls(*(vector if vector.dtype == torch.bool else vector.to(dtype) for vector in vectors), ids, count)

    def take(self, places: Tensor) -> "Responses":
        """The tokens at ``places``, in that order; a place of -1 becomes a masked token of garbage."""
        pad = places < 0
        tensors = {name: value[places.clamp(min=0)] for name, value in vars(self).items() if name != "count"}
        for name in ("logp", "old_logp", "ref_logp", "advantages", "weights"):
            tensors[name] = tensors[name].where(~pad, torch.nan)
        tensors["mask"] = tensors["mask"] & ~pad
        return Responses(**tensors, count=self.count)

    def segments(self, group=None) -> Segments:
        return Segments(self.ids, self.count, group)


def share(part: Responses, aggregation: str, group=None) -> Tensor:
    return normalizer_share(part.mask, aggregation, segments=part.segments(group))


def loss_of(part: Responses, variant: dict, aggregation: str, normalizer, group=None) -> tuple[Tensor, Tensor]:
    """Loss with weights and a KL penalty, and its gradient [T]."""
    logp = part.logp.clone().requires_grad_()
    shared = {"segments": part.segments(group), "max_length": MAX_LENGTH}
    options = {**variant, **shared, "aggregation": aggregation, "weights": part.weights, "normalizer": normalizer}
    loss = policy_loss(logp, part.old_logp, part.advantages, part.mask, **options).total
    kept = logp.where(part.mask, 0), part.ref_logp.where(part.mask, 0)
    loss = loss + 0.1 * aggregate(kl_penalty(*kept), part.mask, aggregation, **shared) / normalizer
    return loss.detach(), torch.autograd.grad(loss, logp)[0]
