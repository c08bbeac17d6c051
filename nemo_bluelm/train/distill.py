"""Distillation: the student's loss is (1 - w) * CE + w * T^2 * KL(teacher || student)."""

from typing import Optional

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import Part, Recipe
from nemo_bluelm.data.packs import PackedBatch
from nemo_bluelm.layers.context import context_rows
from nemo_bluelm.layers.divergence import divergence, likeliest, top_k_divergence
from nemo_bluelm.model.flops import pack_flops
from nemo_bluelm.runtime.plugin import BlueLM
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, resolve_checkpoint
from nemo_bluelm.runtime.teacher import Teacher
from nemo_bluelm.train.teachers import teacher_recipe


def module_class(recipe: Recipe) -> type[BlueLM]:
    """What trains the recipe's model."""
    distill = recipe.distill
    return BlueLM if distill.teacher is None and distill.logits is None else DistilledBlueLM


def ramp(start: float, end: Optional[float], step: int, steps: int) -> float:
    """A value that goes linearly from ``start`` at the first step, 0, to ``end`` at the last; None stays at start."""
    return start if end is None else start + (end - start) * min(1.0, step / max(1, steps - 1))


class DistilledBlueLM(BlueLM):
    """BlueLM that learns from a teacher that runs beside it, or from logits that came with its packs."""

    _teacher: Optional[Teacher] = None

    def configure_model(self, vp_stage: Optional[int] = None) -> None:
        super().configure_model(vp_stage)
        recipe = self.recipe
        if recipe.distill.teacher is not None:
            checkpoint = resolve_checkpoint(recipe.distill.teacher, "distill.teacher")
            beside = teacher_recipe(recipe, load_recipe(str(checkpoint / RECIPE_FILE), []))
            self._teacher = Teacher(checkpoint, beside, self.image_token_id)

    def forward(self, batch: PackedBatch) -> Tensor:
        """One pack: fp32 [3, S / context size]: the loss of every row, its cross-entropy and its divergence."""
        distill, step, steps = self.recipe.distill, self.trainer.global_step, self.recipe.train.steps
        weight = ramp(distill.weight, distill.weight_end, step, steps)
        temperature = ramp(distill.temperature, distill.temperature_end, step, steps)
        logits = self.module(batch)
        k = distill.top_k and round(ramp(distill.top_k, distill.top_k_end, step, steps))
        apart = self._divergence(batch, logits[0], temperature, k) * temperature**2
        # Last, because Megatron-Core's cross-entropy works in the logits' memory.
        labels = context_rows(batch.labels, batch.bounds)
        entropy = self.module.language.compute_language_model_loss(labels, logits.transpose(0, 1))[0]
        return torch.stack(((1 - weight) * entropy + weight * apart, entropy.detach(), apart.detach()))

    def _divergence(self, batch: PackedBatch, logits: Tensor, temperature: float, k: Optional[int]) -> Tensor:
        """KL(teacher || student) of every row, fp32 [S / context size]; of the ``k`` likeliest tokens, None: of all."""
        group = parallel_state.get_tensor_model_parallel_group()
        if self._teacher is None:
            stored = (batch.teacher_ids, batch.teacher_scores)  # likeliest first
            ids, scores = (context_rows(rows, batch.bounds)[0, :, :k] for rows in stored)
            scores = (scores.float() / temperature).log_softmax(1) if temperature != 1 else scores
            return top_k_divergence(logits, ids, scores, temperature, group)
        teacher = self._teacher.logits(batch)
        if k is None:
            return divergence(logits, teacher, temperature, group)
        return top_k_divergence(logits, *likeliest(teacher, k, temperature, group), temperature, group)

    def other_losses(self) -> dict[str, Tensor]:
        return dict(zip(("cross_entropy", "divergence"), self._loss.others))

    def step_flops(self, lengths: list[int], tiles: int) -> int:
        """The student's, and those of the teacher's forward pass."""
        beside = 0
        if self._teacher is not None:
            beside = pack_flops(self._teacher.model_config, lengths, tiles, frozen=tuple(Part)).total
        return super().step_flops(lengths, tiles) + beside
