"""The peer: the recipe's model as one would join it by hand from transformers' SigLIP and Llama or Qwen3."""

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemo_bluelm.config.schema import Activation, LanguageConfig, ModelConfig, Part, geometry_of, projector_width
from nemo_bluelm.convert.hf_config import language_config, vision_config
from nemo_bluelm.model.projector import fold_tokens


class HFModel(torch.nn.Module):
    """SigLIP, the projector and Llama (Qwen3) of a model's shapes; without images, the language model alone.

    Args:
        model: shapes.
        image_token: id of the placeholder that visual tokens replace.
        images: build ViT and projector too.

    Attributes:
        recompute: recompute each layer in the backward pass.
    """

    def __init__(self, model: ModelConfig, image_token: int, images: bool):
        from transformers import AutoModelForCausalLM

        super().__init__()
        self.image_token, self.recompute = image_token, False
        self.language = AutoModelForCausalLM.from_config(_language(model.language))
        if not images:
            return
        geometry, hidden = geometry_of(model), model.language.hidden_size
        self.side, self.merge = geometry.patches_per_side, geometry.merge
        folded = geometry.merge**2 * model.vision.hidden_size
        self.vision = _siglip(model)
        self.projector = torch.nn.Sequential(
            *([torch.nn.LayerNorm(folded)] if model.projector.layer_norm else []),
            torch.nn.Linear(folded, projector_width(model)),
            _SwiGLU() if model.projector.activation is Activation.swiglu else torch.nn.GELU(),
            torch.nn.Linear(hidden, hidden),
        )

    def freeze(self, parts: Sequence[Part]) -> None:
        """Stop the gradients of whole parts."""
        for part in parts:
            if hasattr(self, part.value):
                getattr(self, part.value).requires_grad_(False)

    def compile_layers(self) -> None:
        """torch.compile each layer of both transformers by itself: minutes less than the whole, and as fast."""
        for layer in [*self.language.model.layers, *(self._vision_layers() if hasattr(self, "vision") else ())]:
            layer.compile()

    def visual(self, tiles: Tensor) -> Tensor:
        """uint8 [n, 3, T, T] -> visual tokens [n, tokens, hidden]."""
        features = self.vision(pixel_values=tiles / 127.5 - 1.0).last_hidden_state
        return self.projector(fold_tokens(features, self.side, self.merge))

    def forward(self, tokens: Tensor, tiles: Tensor, positions: Tensor, mask: Optional[Tensor]) -> Tensor:
        """
        The layers of ``LlamaModel`` are called one by one: its own forward turns position ids into a dense mask even
        where plain causal attention, which has faster kernels, would do.

        Args:
            tokens: int64 [b, s].
            tiles: uint8 [n, 3, T, T], in the order of their placeholders.
            positions: int64 [1 or b, s].
            mask: bool [1, 1, s, s], True where a row may look; None is plain causal attention.

        Returns:
            Logits [b, s, vocabulary].
        """
        llama = self.language.model
        hidden = llama.embed_tokens(tokens)
        if len(tiles):
            visual = self.visual(tiles).flatten(0, 1).to(hidden.dtype)
            hidden = hidden.masked_scatter((tokens == self.image_token).unsqueeze(-1), visual)
        rotary = llama.rotary_emb(hidden, positions)
        for layer in llama.layers:
            extra = dict(attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            if self.recompute:
                hidden = checkpoint(layer, hidden, use_reentrant=False, **extra)
            else:
                hidden = layer(hidden, **extra)
        return self.language.lm_head(llama.norm(hidden))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum over the targets, in fp32 as transformers computes it; ``labels`` int64 [b, s], -100 is no target."""
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")

    def _vision_layers(self) -> Sequence[torch.nn.Module]:
        return getattr(self.vision, "vision_model", self.vision).encoder.layers


class _SwiGLU(torch.nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        x, gate = hidden.chunk(2, -1)
        return x * F.silu(gate)


def _siglip(model: ModelConfig) -> torch.nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**vision_config(model), attn_implementation="sdpa"))


def _language(language: LanguageConfig):
    from transformers import AutoConfig

    return AutoConfig.for_model(**language_config(language), use_cache=False, attn_implementation="sdpa")
