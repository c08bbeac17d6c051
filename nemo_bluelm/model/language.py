"""The dense language model: Megatron-Core's GPTModel on packs."""

from typing import Optional

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemo_bluelm.config.schema import LanguageConfig
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
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
        angles = self.rotary_pos_emb(packed_seq_params.max_seqlen_q, packed_seq=True)
        if isinstance(angles, tuple):  # YaRN returns its attention scale too, which attention reads from the config
            angles = angles[0]
        if self.config.apply_rope_fusion:
            angles = angles.index_select(0, position_ids[0])
        return decoder_input, angles, None, None, None
