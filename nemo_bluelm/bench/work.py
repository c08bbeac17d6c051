"""How much a pack holds, counted on the host."""

from collections.abc import Sequence

from nemo_bluelm.config.schema import ModelConfig, Part
from nemo_bluelm.data.packs import PackedBatch
from nemo_bluelm.model.flops import pack_flops


def work_of(batch: PackedBatch, model: ModelConfig, frozen: Sequence[Part]) -> tuple[int, int]:
    """(real tokens, model FLOPs forward and backward) of a pack that lies on the host."""
    lengths = batch.cu_seqlens.diff().tolist()
    return sum(lengths), pack_flops(model, lengths, batch.tiles.size(0), frozen).total
