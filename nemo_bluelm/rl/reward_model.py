"""A reward model: BlueLM with a scalar head, and the Bradley-Terry loss of preferred answers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, tensor_parallel
from nemo import lightning as nl
from torch import Tensor

from nemo_bluelm.config.schema import Recipe, geometry_of
from nemo_bluelm.data.chat import Message
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.model.bluelm import BlueLMModel
from nemo_bluelm.model.flops import pack_flops
from nemo_bluelm.rl.preferences import Answered, Encoder, ScoredBatch, lay
from nemo_bluelm.runtime.plugin import BlueLM
from nemo_bluelm.runtime.run_dir import WEIGHTS_DIR
from nemo_bluelm.runtime.sharing import loads, share_tiles
from nemo_bluelm.runtime.single import STATE_PREFIX, load_model, single_process_world
from nemo_bluelm.runtime.storage import reading
from nemo_bluelm.train.losses import TokenLoss

_HEAD = "reward_head"


def add_reward_head(model: BlueLMModel) -> None:
    """Let a model give its last hidden states instead of logits, with a head that scores them.

    The head is a part of the language model, ``language.reward_head``: its learning rate is that part's, and a run
    that starts from a checkpoint without one reports it as new there. It starts at zero, so every answer's first score
    is 0. An output layer of its own stays as it is, so that the weights serve other runs too.
    """
    language = model.language
    language.post_process = False  # Megatron then returns what its last norm gives
    language._shared_here = False  # no output layer gives the embedding's weight a gradient
    language.output_layer.requires_grad_(False)
    weight = language.embedding.word_embeddings.weight
    head = torch.nn.Linear(model.config.hidden_size, 1, bias=False, dtype=weight.dtype, device=weight.device)
    torch.nn.init.zeros_(head.weight)
    language.add_module(_HEAD, head)


def scores(model: BlueLMModel, batch: ScoredBatch) -> Tensor:
    """fp32 [n]: of the documents at ``batch.ends``; the same on all tensor-parallel ranks."""
    hidden = model(batch)
    if model.config.sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    return F.linear(hidden[batch.ends, 0].float(), model.language.reward_head.weight.float())[:, 0]


class PairLoss(TokenLoss):
    """``-log sigmoid(r_chosen - r_rejected)`` (Bradley-Terry; InstructGPT, arXiv 2203.02155, equation 1), summed over
    pairs; Megatron divides by their number in the whole global batch.

    ``others`` has the share of pairs whose chosen answer scores higher, and the mean difference of scores.
    """

    def forward(self, batch: ScoredBatch, scores: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """
        Args:
            scores: fp32 [2 n], a pair's chosen answer before its rejected one.

        Returns:
            As :class:`TokenLoss`, of pairs.
        """
        margins = scores[0::2] - scores[1::2]
        loss = F.softplus(-margins).sum()
        count = torch.tensor(len(margins), dtype=torch.int32, device=scores.device)
        told = torch.stack((loss, (margins > 0).float().sum(), margins.sum(), count.float())).detach()
        return loss, count, {"sums_and_count": told}


class RewardModel(BlueLM):
    """BlueLM that learns which of two answers is preferred.

    Args:
        optim: NeMo optimizer module.
    """

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, optim: Optional[nl.MegatronOptimizerModule] = None):
        super().__init__(recipe, tokenizer.image, PairLoss, optim)

    def configure_model(self, vp_stage: Optional[int] = None) -> None:
        super().configure_model(vp_stage)
        add_reward_head(self.module)

    def data_step(self, dataloader_iter) -> ScoredBatch:
        """The next pack; every rank of a model copy has read the same pairs, the first one's pixels count."""
        batch, _, _ = next(dataloader_iter)
        lengths = batch.cu_seqlens.diff().tolist()
        self.real_tokens += sum(lengths)
        self.model_flops += self.step_flops(lengths, batch.tiles.size(0))
        if not loads():
            batch = replace(batch, tiles=batch.tiles.to("meta"))
        return share_tiles(batch, self.device, self.recipe.parallel.share_tiles).to(self.device)

    def forward(self, batch: ScoredBatch) -> Tensor:
        """fp32 [n], the scores of a pack's answers."""
        return scores(self.module, batch)

    def step_flops(self, lengths: list[int], tiles: int) -> int:
        """Without the output layer."""
        train = self.recipe.train
        flops = pack_flops(self.recipe.model, lengths, tiles, train.freeze, train.lora)
        return flops.total - flops.output

    def other_losses(self) -> dict[str, Tensor]:
        return dict(zip(("accuracy", "margin"), self._loss.others))


class Judge:
    """A trained reward model in one process. Make one with :func:`open_reward_model`."""

    def __init__(self, model: BlueLMModel, recipe: Recipe, tokenizer: Tokenizer):
        geometry = geometry_of(recipe.model)
        self._model, self._pad, self._tile = model, tokenizer.pad, geometry.tile
        self._longest = recipe.data.sequence_length
        self.encoder = Encoder(tokenizer, geometry, recipe.data.chat.control_token)

    def scores(
        self, messages: Sequence[Message], answers: Sequence[str], images: Sequence[bytes] = ()
    ) -> list[Optional[float]]:
        """Of each answer to a conversation that ends with the user's turn; None of one longer than the packs that the
        model was trained on.

        Raises:
            UserError: messages and images that don't go together, or an image that can't be decoded.
        """
        answered = self.encoder.answered(messages, images, answers)
        fitting = [one for one in answered if len(one.document.tokens) <= self._longest]
        found = iter(self._scores(fitting))
        return [next(found) if len(one.document.tokens) <= self._longest else None for one in answered]

    @torch.no_grad()
    def _scores(self, answered: Sequence[Answered]) -> list[float]:
        length = sum(len(one.document.tokens) for one in answered)
        if not length:
            return []
        batch = lay(answered, length, self._pad, self._tile)
        return scores(self._model, batch.to(self._model.language.reward_head.weight.device)).tolist()


@contextmanager
def open_reward_model(checkpoint: Path) -> Iterator[Judge]:
    """A reward model that any layout has written; call ``prepare`` before this module is imported.

    Args:
        checkpoint: as :func:`nemo_bluelm.rl.reward_job.resolve_reward_model` gives it.

    Raises:
        UserError: the weights can't be read.
    """
    with single_process_world():
        model, recipe, tokenizer = load_model(checkpoint)
        add_reward_head(model)
        head = model.language.reward_head
        wanted = model.sharded_state_dict(prefix=STATE_PREFIX)
        key = f"{STATE_PREFIX}language.{_HEAD}.weight"
        with reading(checkpoint):
            state = dist_checkpointing.load({key: wanted[key]}, str(checkpoint / WEIGHTS_DIR))
        head.load_state_dict({"weight": state[key]})
        yield Judge(model.eval(), recipe, tokenizer)
