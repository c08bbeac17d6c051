"""BlueLM-2.5: SigLIP2 ViT, projector and language model in one Megatron module."""

from typing import Optional

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_bluelm.config.schema import ModelConfig, Part, geometry_of
from nemo_bluelm.data.packs import PackedBatch
from nemo_bluelm.layers.attention import PackParams
from nemo_bluelm.layers.context import context_rows
from nemo_bluelm.layers.tile_shares import gather_tiles
from nemo_bluelm.model.config import LanguageTransformerConfig, vision_transformer_config
from nemo_bluelm.model.language import LanguageModel
from nemo_bluelm.model.projector import Projector
from nemo_bluelm.registry import VISION_TOWERS


class BlueLMModel(MegatronModule):
    """The whole model, or the part of it that one pipeline rank holds.

    ViT and projector live on the first pipeline rank. Images enter as tiles; the token row already holds one
    ``image_token_id`` for every visual token, so lengths, labels and positions are final before the model sees them.

    Args:
        config: of the language model, with the parallel layout; its dtype is the whole model's.
        model: shapes of all parts.
        image_token_id: id of the placeholder that visual tokens replace.
        max_sequence_length: longest pack, in tokens.
        pre_process, post_process: this rank holds the first / last pipeline stage.
        vp_stage: index of the model chunk under virtual pipelining.
        vision_config: of the ViT; None makes one beside ``config``, without FP8 and recomputation.
        pg_collection: over which the language model is laid; None takes Megatron's.
    """

    def __init__(
        self,
        config: LanguageTransformerConfig,
        model: ModelConfig,
        image_token_id: int,
        max_sequence_length: int,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: Optional[int] = None,
        vision_config: Optional[TransformerConfig] = None,
        pg_collection: Optional[ProcessGroupCollection] = None,
    ):
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder  # read by Megatron's schedules
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.image_token_id = image_token_id
        self.share_embeddings_and_output_weights = model.language.share_embeddings_and_output_weights
        if pre_process:
            geometry = geometry_of(model)
            self._tokens_per_tile = geometry.tokens_per_tile
            device = None if config.use_cpu_initialization else torch.cuda.current_device()
            tower = VISION_TOWERS.find(model.vision.tower, "model.vision.tower")
            self.vision = tower(vision_config or vision_transformer_config(model.vision, config), geometry)
            self.projector = Projector(model, config.params_dtype, device)
        self.language = LanguageModel(
            config, model.language, max_sequence_length, pre_process, post_process, vp_stage, pg_collection
        )

    def freeze(self, parts: list[Part]) -> None:
        """Stop the gradients of whole parts."""
        for part in parts:
            module = getattr(self, part.value, None)
            if module is not None:
                module.requires_grad_(False)

    @property
    def decoder(self) -> TransformerBlock:
        """The language model's layers, which Megatron's schedules tell the number of the micro-batch: CUDA graphs then
        cast weights to FP8 at a step's first one only."""
        return self.language.decoder

    def set_input_tensor(self, input_tensor: Tensor) -> None:
        """Called by Megatron's pipeline schedules with the previous stage's output."""
        self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Called by Megatron to sum the tied embedding's gradients of the first and last stage."""
        return self.language.shared_embedding_or_output_weight()

    def embed(
        self, tokens: Tensor, position_ids: Tensor, tiles: Tensor, shares: Optional[tuple[tuple[int, ...], ...]] = None
    ) -> Tensor:
        """Token embeddings with the visual tokens in their places.

        Args:
            tokens, position_ids: int64 [1, S].
            tiles: uint8 [n, 3, T, T] in the order in which their placeholders stand in the row; n may be 0.
            shares: where each rank of the tensor and context group has some of the row's tiles, the places of those
                that it has; None where ``tiles`` are all.

        Returns:
            [S, 1, hidden]; every tensor-parallel rank has the whole row.
        """
        embedded = self.language.embed(tokens, position_ids)
        count = tiles.size(0) if shares is None else sum(map(len, shares))
        if count == 0:
            return embedded + self._anchor().to(embedded)
        visual = self._visual_tokens(tiles)
        if shares is not None:
            visual = gather_tiles(visual, shares)
        visual = visual.flatten(0, 1).unsqueeze(1).to(embedded.dtype)  # [count * tokens of a tile, 1, hidden]
        is_text = tokens[0] != self.image_token_id
        torch._assert_async((~is_text).sum() == visual.size(0), "tiles don't fill the row's placeholders")
        # Placeholders first, in order. Masks would be simpler, but selecting by one makes the host wait for the GPU.
        places = is_text.to(torch.uint8).argsort(stable=True)[: visual.size(0)]
        return embedded.index_copy(0, places, visual)

    def _visual_tokens(self, tiles: Tensor) -> Tensor:
        """uint8 [n, 3, T, T] -> [n, tokens of a tile, hidden], also for no tile: other ranks have theirs."""
        if tiles.size(0):
            return self.projector(self.vision(tiles))
        return self._anchor().expand(0, self._tokens_per_tile, self.config.hidden_size)

    def _anchor(self) -> Tensor:
        """A zero that depends on every trainable weight of ViT and projector.

        A micro-batch without images must still give these weights a gradient, or the overlapped gradient reduction
        waits forever for ranks whose micro-batch has none.
        """
        weights = [w for part in (self.vision, self.projector) for w in part.parameters()]
        nothing = torch.zeros((), dtype=self.config.params_dtype, device=weights[0].device)
        return sum((w.flatten()[:0].sum() for w in weights if w.requires_grad), nothing)

    def forward(self, batch: PackedBatch, labels: Optional[Tensor] = None) -> Tensor:
        """One pack through this rank's part of the model.

        Args:
            batch: the whole row on every rank, with the tiles that this rank works on.
            labels: int64 [1, S / context size], this context-parallel rank's rows.

        Returns:
            Last stage: fp32 loss of every row [1, S / context size] with labels, else logits
            [1, S / context size, vocabulary / tensor size]. Earlier stages: hidden states.
        """
        hidden = None
        if self.pre_process:
            hidden = self.embed(batch.tokens, batch.position_ids, batch.tiles, batch.shares)
            hidden = context_rows(hidden.transpose(0, 1), batch.bounds).transpose(0, 1)
            if self.config.recompute_granularity and torch.is_grad_enabled() and not hidden.requires_grad:
                hidden.requires_grad_()  # Megatron's recomputation gives no gradients to weights alone (LoRA's)
            if self.config.sequence_parallel:
                hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        return self.language(
            batch.tokens,
            context_rows(batch.position_ids, batch.bounds),
            attention_mask=None,
            decoder_input=hidden,
            labels=labels,
            packed_seq_params=packed_seq_params(batch, fixed=self.config.cuda_graph_impl != "none"),
        )


def packed_seq_params(batch: PackedBatch, fixed: bool = False) -> PackParams:
    """A pack's documents as Megatron-Core and Transformer Engine want them.

    The padded bounds serve as the real ones too: pads follow the tokens of their document, so a causal mask hides them.

    Args:
        fixed: leave out what is known on the host alone, which a CUDA graph can't see change.
    """
    bounds, longest = batch.cu_seqlens_padded, batch.max_seqlen
    return PackParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        bounds=None if fixed else batch.bounds,
        equal_segments=batch.equal_segments,
    )
