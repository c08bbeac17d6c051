"""The policy as a NeMo plugin: NeMo-Aligner's actor contract on our model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Optional

import torch
from megatron.core import parallel_state
from nemo import lightning as nl
from torch import Tensor

from nemo_bluelm.config.grpo import Backend
from nemo_bluelm.config.schema import Recipe, geometry_of
from nemo_bluelm.data.packs import PackedBatch
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.generate.generator import Generator
from nemo_bluelm.layers.divergence import token_log_probabilities
from nemo_bluelm.rl.backends.base import InferenceBackendBase
from nemo_bluelm.rl.backends.mcore import MCoreBackend
from nemo_bluelm.rl.batch import RolloutBatch
from nemo_bluelm.rl.objective import PolicyObjective, token_rows
from nemo_bluelm.runtime.plugin import BlueLM
from nemo_bluelm.runtime.sharing import loads, share_tiles
from nemo_bluelm.runtime.teacher import Teacher


class Actor(BlueLM):
    """BlueLM that learns from rewarded replies.

    Args:
        reference: checkpoint that the KL penalty is measured against; None without one.
        optim: NeMo optimizer module.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: Tokenizer, reference: Optional[Path], optim: nl.MegatronOptimizerModule
    ):
        super().__init__(recipe, tokenizer.image, PolicyObjective, optim)
        self._loss.grpo = recipe.grpo
        self._tokenizer, self._reference_checkpoint = tokenizer, reference
        self._reference: Optional[Teacher] = None
        self.rollout_figures: dict[str, float] = {}  # of the GRPO step at hand

    def configure_model(self, vp_stage: Optional[int] = None) -> None:
        super().configure_model(vp_stage)
        if self._reference_checkpoint is not None:
            alone = replace(self.recipe, train=replace(self.recipe.train, lora=type(self.recipe.train.lora)()))
            self._reference = Teacher(self._reference_checkpoint, alone, self.image_token_id)

    def data_step(self, dataloader_iter) -> PackedBatch:
        """The next pack, its tiles shared out as in other training: every rank of a model copy has written the same
        replies, the first one's pixels count."""
        batch, _, _ = next(dataloader_iter)
        lengths = batch.cu_seqlens.diff().tolist()
        self.real_tokens += sum(lengths)
        self.model_flops += self.step_flops(lengths, batch.tiles.size(0))
        return self._on_device(batch)

    def _on_device(self, batch: RolloutBatch) -> RolloutBatch:
        if not loads():
            batch = replace(batch, tiles=batch.tiles.to("meta"))
        return share_tiles(batch, self.device, self.recipe.parallel.share_tiles).to(self.device)

    def forward(self, batch: RolloutBatch) -> Tensor:
        """fp32 [2, S]: log-probability of every label at the rollouts' temperature, and the entropy there."""
        grpo = self.recipe.grpo
        return token_rows(
            self.module(batch)[0], batch.labels[0], grpo.generation.temperature, bool(grpo.loss.entropy_coeff)
        )

    @property
    def generator(self) -> Generator:
        """Encodes prompts, and writes replies by the weights as they are."""
        geometry, control_token = geometry_of(self.recipe.model), self.recipe.data.chat.control_token
        decode = self.recipe.data.decode.backend.value
        # DALI starts a pipeline for a call; Torch's tiles are as close to its as Pillow's, and faster.
        return Generator(self.module, self._tokenizer, geometry, control_token, "pil" if decode == "pil" else "torch")

    def backend(self, chunks: Sequence[torch.nn.Module]) -> InferenceBackendBase:
        """What writes replies in rollouts.

        Args:
            chunks: this rank's DistributedDataParallel modules.
        """
        if self.recipe.grpo.generation.backend == Backend.vllm:
            from nemo_bluelm.rl.backends.vllm import VllmBackend

            return VllmBackend(self.generator, chunks, self.recipe)
        return MCoreBackend(self.generator, chunks, self.recipe.grpo.generation.batch)

    @torch.no_grad()
    def get_inference_log_probs(self, batch: RolloutBatch) -> Tensor:
        """fp32 [1, S] on the host: log-probabilities of the labels under the policy as it is, by the training graph."""
        return self._log_probs(self.module(self._on_device(batch))[0], batch)

    @torch.no_grad()
    def get_init_policy_logprobs(self, batch: RolloutBatch) -> Tensor:
        """The same under the reference."""
        return self._log_probs(self._reference.logits(self._on_device(batch)), batch)

    def _log_probs(self, logits: Tensor, batch: RolloutBatch) -> Tensor:
        group, temperature = parallel_state.get_tensor_model_parallel_group(), self.recipe.grpo.generation.temperature
        return token_log_probabilities(logits, batch.labels[0].to(logits.device), temperature, group)[None].cpu()

    def other_losses(self) -> dict[str, Tensor]:
        """Figures of the policy's last update, and of the rollout that it learnt from."""
        figures = {**self._loss.results(), **self.rollout_figures}
        return {name: torch.tensor([value], dtype=torch.float64) for name, value in figures.items()}
