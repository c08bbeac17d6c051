"""The dense language model: Megatron-Core's GPTModel on packs."""

from typing import Optional

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from nemo_bluelm.config.schema import LanguageConfig
from nemo_bluelm.layers.embedding import accumulating_embedding
from nemo_bluelm.layers.specs import block_spec
from nemo_bluelm.model.config import LanguageTransformerConfig


class LanguageModel(GPTModel):
    """Decoder-only transformer with RoPE or YaRN; always fed with packs in ``thd`` format.

    Args:
        max_sequence_length: longest pack, in tokens.
        vp_stage: index of the model chunk under virtual pipelining.
        pg_collection: over which it is laid; None takes Megatron's.
    """

    def __init__(
        self,
        config: LanguageTransformerConfig,
        language: LanguageConfig,
        max_sequence_length: int,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: Optional[int] = None,
        pg_collection: Optional[ProcessGroupCollection] = None,
    ):
        if config.gradient_accumulation_fusion and config.transformer_impl == "transformer_engine":
            from nemo_bluelm.layers.te import install_wgrad_accumulation

            install_wgrad_accumulation()  # the output layer refuses to be made without it
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(config, causal=True, vp_stage=vp_stage),
            vocab_size=language.vocab_size,
            max_sequence_length=max_sequence_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=language.share_embeddings_and_output_weights,
            position_embedding_type="yarn" if language.yarn.factor > 1 else "rope",
            rotary_base=language.rotary_base,
            scatter_embedding_sequence_parallel=False,  # visual tokens are merged into the whole sequence first
            vp_stage=vp_stage,
            pg_collection=pg_collection,
        )
        # Both layers of a shared weight then add to its main_grad by themselves; no gradient is left to be zeroed.
        self._shared_here = self.pre_process and self.post_process and self.share_embeddings_and_output_weights
        if config.gradient_accumulation_fusion and self._shared_here:
            self.shared_embedding_or_output_weight().zero_out_wgrad = False

    def embed(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """int64 [1, S] -> [S, 1, hidden]; every tensor-parallel rank has the whole."""
        if not self.config.gradient_accumulation_fusion:
            return self.embedding(input_ids=tokens, position_ids=position_ids)
        return accumulating_embedding(self.embedding.word_embeddings, tokens, self._shared_here).transpose(0, 1)

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        decoder_input: Optional[Tensor] = None,
        inference_context=None,
        packed_seq_params: Optional[PackedSeqParams] = None,
    ):
        """The decoder's input and RoPE's angles.

        GPTModel asks YaRN for angles already cut for context parallelism and its packed RoPE cuts them again
        (Megatron-Core 0.15); here both kinds give uncut angles for the longest document, by position. Fused RoPE gets
        those of ``position_ids``, this rank's rows.
        """
        if decoder_input is None and self.pre_process:
            decoder_input = self.embed(input_ids, position_ids)
        angles = self._angles(packed_seq_params.max_seqlen_q, position_ids, self.config.apply_rope_fusion)
        return decoder_input, angles, None, None, None

    def _angles(self, longest: int, position_ids: Tensor, of_rows: bool) -> Tensor:
        """RoPE's angles, fp32 [longest, 1, 1, d], or those of the rows, [S, 1, 1, d]."""
        angles = self.rotary_pos_emb(longest, packed_seq=True)
        if isinstance(angles, tuple):  # YaRN returns its attention scale too, which attention reads from the config
            angles = angles[0]
        return angles.index_select(0, position_ids[0]) if of_rows else angles

    def hidden_states(
        self, embedded: Tensor, position_ids: Tensor, longest: int, packed_seq_params: Optional[PackedSeqParams] = None
    ) -> Tensor:
        """The layers and the last norm, to generate with (see ``nemo_bluelm.generate.decoder``).

        Args:
            embedded: [S, 1, hidden], a pack, or without ``packed_seq_params`` the next token of each of S sequences.
            position_ids: int64 [1, S].
            longest: more than any position.

        Returns:
            [S, 1, hidden].
        """
        of_rows = packed_seq_params is None or self.config.apply_rope_fusion
        angles = self._angles(longest, position_ids, of_rows)
        return self.decoder(embedded, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=packed_seq_params)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, 1, hidden] -> fp32 [n, vocabulary], whole on every tensor-parallel rank."""
        shared = self.share_embeddings_and_output_weights
        logits, _ = self.output_layer(hidden, weight=self.shared_embedding_or_output_weight() if shared else None)
        return gather_from_tensor_model_parallel_region(logits, group=self.pg_collection.tp)[:, 0].float()

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """int64 [1, S], [S, 1, vocabulary / tensor size] -> fp32 [1, S]."""
        if not self.config.cross_entropy_loss_fusion:
            return super().compute_language_model_loss(labels, logits)
        from nemo_bluelm.layers.cross_entropy import cross_entropy

        return cross_entropy(logits, labels, self.pg_collection.tp)
