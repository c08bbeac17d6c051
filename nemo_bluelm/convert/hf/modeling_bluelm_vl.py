"""BlueLM-2.5 vision-language model. Images, placeholders and the cache are handled as in Cohere2Vision."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers.models.cohere2_vision.modeling_cohere2_vision import (
    Cohere2VisionForConditionalGeneration,
    Cohere2VisionModel,
    Cohere2VisionPreTrainedModel,
)

from .configuration_bluelm_vl import BlueLMVLConfig


class BlueLMVLProjector(nn.Module):
    """Fold, LayerNorm, Linear, GELU, Linear; ``config.projector`` may leave the norm out or ask for a gated SiLU."""

    def __init__(self, config: BlueLMVLConfig):
        super().__init__()
        self.merge = config.downsample_factor
        folded, hidden = config.vision_config.hidden_size * self.merge**2, config.text_config.hidden_size
        options = {"layer_norm": True, "activation": "gelu", **(getattr(config, "projector", None) or {})}
        self.gated = options["activation"] == "swiglu"
        self.norm = nn.LayerNorm(folded) if options["layer_norm"] else nn.Identity()
        self.linear_1 = nn.Linear(folded, config.alignment_intermediate_size)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, features: Tensor) -> Tensor:
        """[tiles, side * side, vision hidden] -> [tiles, ceil(side / merge)^2, hidden]."""
        count, patches, channels = features.shape
        side, merge = round(patches**0.5), self.merge
        pad = -side % merge  # an odd grid gets a row of zeros below and a column at the right
        grid = F.pad(features.reshape(count, side, side, channels), (0, 0, 0, pad, 0, pad))
        out = (side + pad) // merge
        grid = grid.reshape(count, out, merge, out, merge, channels).permute(0, 1, 3, 2, 4, 5)
        folded = grid.reshape(count, out * out, merge * merge * channels)
        inner = self.linear_1(self.norm(folded))
        if not self.gated:
            return self.linear_2(F.gelu(inner))
        x, gate = inner.chunk(2, -1)
        return self.linear_2(x * F.silu(gate))


class BlueLMVLModel(Cohere2VisionModel):
    config_class = BlueLMVLConfig
    config: BlueLMVLConfig

    def __init__(self, config: BlueLMVLConfig):
        Cohere2VisionPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = BlueLMVLProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()


class BlueLMVLForConditionalGeneration(Cohere2VisionForConditionalGeneration):
    config_class = BlueLMVLConfig
    config: BlueLMVLConfig

    def __init__(self, config: BlueLMVLConfig):
        Cohere2VisionPreTrainedModel.__init__(self, config)
        self.model = BlueLMVLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
