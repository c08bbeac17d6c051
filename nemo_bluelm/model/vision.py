"""SigLIP2 vision transformer: tiles in, patch features out."""

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from nemo_bluelm.geometry import Geometry
from nemo_bluelm.layers.specs import block_spec

# Checkpoints name norms as Transformer Engine does, fused into the linear layer that follows them, and the rest as
# Megatron-Core does; layers.te.FusedMLP has names of its own.
CHECKPOINT_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    "mlp.layer_norm_": "mlp.linear_fc1.layer_norm_",
    "mlp.fc1_": "mlp.linear_fc1.",
    "mlp.fc2_": "mlp.linear_fc2.",
}


def _alone() -> ProcessGroupCollection:
    """Process groups of one rank: every rank holds the whole ViT."""
    group = torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)
    return ProcessGroupCollection(tp=group, cp=group, pp=group)


class VisionTower(MegatronModule):
    """SigLIP2 so400m shape (arXiv 2502.14786): patch embedding, learned positions, pre-norm blocks, closing LayerNorm.

    Attention is full, not causal. There is no pooling head; the features are the last layer's after the LayerNorm.
    The weights are replicated over tensor-, context- and data-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, geometry: Geometry):
        super().__init__(config)
        dtype, hidden = config.params_dtype, config.hidden_size
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.patch_embedding = torch.nn.Conv2d(
            3, hidden, geometry.patch, stride=geometry.patch, dtype=dtype, device=device
        )
        self.position_embedding = torch.nn.Parameter(
            torch.empty(geometry.patches_per_side**2, hidden, dtype=dtype, device=device)
        )
        self.blocks = TransformerBlock(config, block_spec(config, causal=False), pg_collection=_alone())
        for parameter in self.parameters():
            # Megatron's parallel linear layers mark their weights as pieces; the gradient norm would count these
            # once for every tensor-parallel rank.
            parameter.tensor_model_parallel = False

    def forward(self, tiles: Tensor) -> Tensor:
        """
        Args:
            tiles: uint8 [n, 3, T, T], RGB.

        Returns:
            [n, (T / patch)^2, hidden] in the parameters' dtype; patches row by row.
        """
        count = tiles.size(0)
        if self.config.fp8:  # rows of an FP8 product come in sixteens
            tiles = F.pad(tiles, (0, 0, 0, 0, 0, 0, 0, -count % 16))
        pixels = tiles.to(self.position_embedding.dtype) / 127.5 - 1.0  # SigLIP's mean and std of 0.5
        patches = self.patch_embedding(pixels).flatten(2).permute(2, 0, 1)  # [patches, n, hidden]
        # Contiguous, or the sum keeps the convolution's order in memory and every norm copies its input.
        hidden = patches.contiguous() + self.position_embedding.unsqueeze(1)
        return self.blocks(hidden_states=hidden, attention_mask=None).transpose(0, 1)[:count]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict = None
    ) -> ShardedStateDict:
        """Every tensor whole, one replica a rank; Megatron's layers would claim pieces of the global tensor group."""
        sharded = make_sharded_tensors_for_checkpoint(self.state_dict(prefix="", keep_vars=True), prefix)
        for tensor in sharded.values():
            for local, in_checkpoint in CHECKPOINT_NAMES.items():
                tensor.key = tensor.key.replace(local, in_checkpoint)
        return sharded
