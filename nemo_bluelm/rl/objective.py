"""The GRPO loss over a global batch of packs, through Megatron's schedule."""

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_bluelm.config.grpo import GrpoConfig
from nemo_bluelm.layers.divergence import entropy, token_log_probabilities
from nemo_bluelm.rl.batch import RolloutBatch
from nemo_bluelm.rl.correction import rollout_correction
from nemo_bluelm.rl.loss import aggregate, kl_penalty, normalizer_share, policy_loss
from nemo_bluelm.rl.metrics import Tally, add_mismatch, add_policy
from nemo_bluelm.train.losses import TokenLoss

_NORMALIZER = "normalizer"


class PolicyObjective(TokenLoss):
    """A micro-batch's sum of losses, and what Megatron divides by after all of them: tokens or replies.

    Attributes:
        tally: figures of the optimizer step at hand; whoever reads them puts a new one in its place.
    """

    def __init__(self, grpo: GrpoConfig | None = None):
        super().__init__()
        self.grpo, self.tally = grpo, Tally()

    def forward(self, batch: RolloutBatch, rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """
        Args:
            rows: fp32 [2, S], log-probability of every label, and entropy at every place.

        Returns:
            As :class:`TokenLoss`.
        """
        keys, mask, segments = self.grpo.loss, batch.loss_mask[0], batch.segments()
        logp, entropies = rows
        old = logp.detach() if batch.old_logp is None else batch.old_logp[0]
        correction = keys.rollout_correction
        weights = rollout_correction(
            old,
            batch.rollout_logp[0],
            mask,
            correction.type.value,
            upper=correction.max,
            lower=correction.min,
            segments=segments,
        )
        spread = {
            "aggregation": keys.aggregation.value,
            "segments": segments,
            "max_length": self.grpo.generation.max_new_tokens,
        }
        loss = policy_loss(
            logp,
            old,
            batch.advantages[0],
            mask,
            policy_loss=keys.policy_loss.value,
            clip_min=keys.ratio_clip_min,
            clip_max=keys.ratio_clip_max,
            clip_c=keys.ratio_clip_c,
            weights=None if correction.type.value == "none" else weights.weights,
            **spread,
        )
        total, reference = loss.total, None if batch.ref_logp is None else batch.ref_logp[0]
        if reference is not None and not keys.kl_in_reward:
            penalty = kl_penalty(logp, reference, keys.reference_policy_kl_type.value)
            total = total + keys.reference_policy_kl_penalty * aggregate(penalty, mask, **spread)
        if keys.entropy_coeff:
            total = total - keys.entropy_coeff * aggregate(entropies, mask, **spread)
        count = normalizer_share(mask, spread["aggregation"], segments=segments).round()
        with torch.no_grad():
            known = {"segments": segments, "ref_logp": reference, "entropy": entropies}
            add_policy(self.tally, loss, logp, old, mask, **known)
            self.tally.total(_NORMALIZER, count)
            add_mismatch(self.tally, old, batch.rollout_logp[0], mask, weights)
        told = torch.stack((total.detach().double(), count))
        return total.float(), count.to(torch.int32), {"sums_and_count": told.float()}

    def results(self) -> dict[str, float]:
        """Figures of the step over all ranks; starts a new tally."""
        tally, self.tally = self.tally, Tally()
        tally.all_reduce(parallel_state.get_data_parallel_group())
        figures = tally.results()
        normalizer = figures.pop(_NORMALIZER, 0)
        if normalizer:
            figures["policy/loss"] /= normalizer
        return figures


def token_rows(logits: Tensor, labels: Tensor, temperature: float, entropies: bool) -> Tensor:
    """What :class:`PolicyObjective` takes.

    Args:
        logits: [S, vocabulary / tensor size].
        labels: int64 [S].
        temperature: that replies are sampled at.
        entropies: with gradients to the entropy too; without, its figures alone.

    Returns:
        fp32 [2, S].
    """
    group = parallel_state.get_tensor_model_parallel_group()
    with torch.set_grad_enabled(entropies and torch.is_grad_enabled()):
        spread = entropy(logits, temperature, group)
    return torch.stack((token_log_probabilities(logits, labels, temperature, group), spread))
