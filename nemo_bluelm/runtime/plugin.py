"""BlueLM as a NeMo plugin: the LightningModule that NeMo's MegatronStrategy drives."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Optional

import lightning.pytorch as L
import torch
from megatron.core import parallel_state
from nemo import lightning as nl
from nemo.lightning import io
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor

from nemo_bluelm.config.schema import Recipe
from nemo_bluelm.data.packs import PackedBatch
from nemo_bluelm.layers.context import context_rows
from nemo_bluelm.model.bluelm import BlueLMModel
from nemo_bluelm.model.config import language_transformer_config, vision_transformer_config
from nemo_bluelm.model.flops import pack_flops
from nemo_bluelm.model.init import initialize
from nemo_bluelm.model.lora import add_lora, leaves_mlp
from nemo_bluelm.runtime.sharing import share_tiles


class BlueLM(L.LightningModule, io.IOMixin, io.ConnectorMixin):
    """The BlueLM-2.5 model of one recipe.

    Args:
        recipe: shapes, layout, precision, seed and frozen parts.
        image_token_id: id of the tokenizer's image placeholder.
        loss: makes the reduction of per-token losses to the training loss.
        optim: NeMo optimizer module; None for a model that is not trained.
    """

    def __init__(
        self,
        recipe: Recipe,
        image_token_id: int,
        loss: Callable[[], MegatronLossReduction],
        optim: Optional[nl.MegatronOptimizerModule] = None,
    ):
        super().__init__()
        self.recipe = recipe
        self.image_token_id = image_token_id
        self.config = language_transformer_config(
            recipe.model.language,
            recipe.parallel,
            recipe.precision,
            recipe.train.recompute,
            recipe.train.cuda_graphs,
        )
        self.config.fused_mlp = leaves_mlp(recipe.train.lora)
        self._loss = loss()
        # Fed to this rank, padding not counted; the metrics callback reads and resets them.
        self.real_tokens = self.model_flops = 0
        if optim is not None:
            optim.connect(self)  # NeMo binds the optimizer here; assigning model.optim later is ignored

    def configure_model(self, vp_stage: Optional[int] = None) -> None:
        """Build this rank's part; Lightning calls it once, NeMo again for every further virtual stage."""
        if self.recipe.parallel.virtual_pipeline is not None:
            vp_stage = vp_stage or 0
        self.module = BlueLMModel(
            self.config,
            self.recipe.model,
            self.image_token_id,
            self.recipe.data.sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
            vision_config=vision_transformer_config(
                self.recipe.model.vision, self.config, self.recipe.precision, self.recipe.train.recompute
            ),
        )
        if self.recipe.train.lora.rank:
            add_lora(self.module.language, self.recipe.train.lora)
        initialize(self.module, self.recipe.model.language, self.recipe.seed)
        self.module.freeze(self.recipe.train.freeze)

    @property
    def training_loss_reduction(self) -> MegatronLossReduction:
        """NeMo looks it up on the class, as a property."""
        return self._loss

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        """Dropout of adapters is a function of seed and step, so that a resumed run goes on as if it had not stopped;
        ranks that share tensors drop the same."""
        if self.recipe.train.lora.dropout:
            data, pipe = parallel_state.get_data_parallel_rank(True), parallel_state.get_pipeline_model_parallel_rank()
            text = f"{self.recipe.seed}/{self.trainer.global_step}/{data}/{pipe}"
            torch.cuda.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1)

    def data_step(self, dataloader_iter) -> PackedBatch:
        """The next micro-batch, on this rank's device."""
        batch, _, _ = next(dataloader_iter)
        train, data = self.recipe.train, self.recipe.data
        if train.cuda_graphs and data.max_documents == 1:
            batch = batch.of_one_document_each(train.micro_batch_size)
        elif train.cuda_graphs:
            batch = batch.of_fixed_shape(train.micro_batch_size * (data.max_documents + 1))  # one more for the tail
        if not self.module.vp_stage:  # further virtual stages are fed the same packs again
            lengths = batch.cu_seqlens.diff().tolist()  # still on the host
            self.real_tokens += sum(lengths)
            self.model_flops += self.step_flops(lengths, batch.tiles.size(0))
        if self.module.pre_process:
            batch = share_tiles(batch, self.device, self.recipe.parallel.share_tiles)
        else:
            no_tiles = batch.tiles.new_empty((0, *batch.tiles.shape[1:]), device=self.device)
            batch = dataclasses.replace(batch, tiles=no_tiles)
        return batch.to(self.device)

    def log(self, *args, **kwargs) -> None:
        """Nothing: ``train.metrics`` writes what is to be known of a step. Of what NeMo logs, Lightning would read two
        numbers off the GPU every step, and the next step would begin with a GPU that waits for the host."""

    def other_losses(self) -> dict[str, Tensor]:
        """What else than the loss the last step has to report, fp32 [] each, by its name in metrics.jsonl."""
        return {}

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the run's sources, where its loss tells them apart."""
        return getattr(self._loss, "sources", ())

    def loss_by_source(self) -> Tensor:
        """Mean loss of each source's targets in the last step, fp32 [sources], NaN where it had none; 0 on other
        pipeline stages than the last."""
        if parallel_state.is_pipeline_last_stage() and self.sources:
            return self._loss.by_source
        return torch.zeros(len(self.sources), device=self.device)

    def step_flops(self, lengths: list[int], tiles: int) -> int:
        """Model FLOPs of one micro-batch: documents of ``lengths`` real tokens, and their tiles."""
        train = self.recipe.train
        return pack_flops(self.recipe.model, lengths, tiles, train.freeze, train.lora).total

    def forward(self, batch: PackedBatch) -> Tensor:
        """One pack through this rank's part: row losses [1, S / context size] on the last stage."""
        return self.module(batch, labels=context_rows(batch.labels, batch.bounds))

    def forward_step(self, batch: PackedBatch) -> Tensor:
        return self.forward(batch)

    def training_step(self, batch: PackedBatch, batch_idx: Optional[int] = None) -> Tensor:
        """NeMo's hook; the micro-batch loop around it is Megatron's."""
        return self.forward_step(batch)
