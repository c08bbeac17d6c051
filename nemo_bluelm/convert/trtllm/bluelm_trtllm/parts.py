"""What of the model needs torch alone: projector, names of weights, images, and checks of the config."""

import copy

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

_VISION, _PROJECTOR, _LANGUAGE = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
_HEAD = "lm_head."


class Projector(nn.Module):
    """Fold, LayerNorm, Linear, GELU, Linear.

    Args:
        channels: of a patch.
        hidden: of the language model.
        merge: patches folded into a token, in each direction.
        layer_norm: whether there is a norm.
        activation: ``gelu``, or ``swiglu``, which is gated.
    """

    def __init__(
        self, channels: int, hidden: int, merge: int, dtype=None, layer_norm: bool = True, activation: str = "gelu"
    ):
        super().__init__()
        self.merge = merge
        folded = channels * merge**2
        self.gated = activation == "swiglu"
        self.norm = nn.LayerNorm(folded, dtype=dtype) if layer_norm else nn.Identity()
        self.linear_1 = nn.Linear(folded, hidden * (2 if self.gated else 1), dtype=dtype)
        self.linear_2 = nn.Linear(hidden, hidden, dtype=dtype)

    def forward(self, features):
        """[tiles, side * side, channels] -> [tiles, ceil(side / merge)^2, hidden]."""
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


def split_weights(weights) -> tuple:
    """The folder's tensors as (vision, projector, language), under the names that each of the three knows.

    Raises:
        ValueError: a name that is of none of them.
    """
    vision, projector, language = {}, {}, {}
    for name in weights:
        if name.startswith(_VISION):
            vision[name[len(_VISION) :]] = weights[name]
        elif name.startswith(_PROJECTOR):
            projector[name[len(_PROJECTOR) :]] = weights[name]
        elif name.startswith(_LANGUAGE):
            language["model." + name[len(_LANGUAGE) :]] = weights[name]
        elif name.startswith(_HEAD):
            language[name] = weights[name]
        else:
            raise ValueError(f"{name} is of no part of a BlueLM-2.5 model")
    return vision, projector, language


def language_quantization(quantization):
    """The folder's quantisation for the language model alone: excluded modules under its own names, ViT's left out."""
    excluded = getattr(quantization, "exclude_modules", None)
    if not excluded:
        return quantization
    own = copy.copy(quantization)
    own.exclude_modules = []
    for pattern in excluded:
        if pattern.startswith(_LANGUAGE):
            own.exclude_modules.append("model." + pattern[len(_LANGUAGE) :])
        elif not any(part in pattern for part in ("vision_tower", "vision_model", "multi_modal_projector")):
            own.exclude_modules.append(pattern)
    return own


def check_rope(text_config) -> None:
    """
    Raises:
        ValueError: a YaRN that TensorRT-LLM would compute in another way than the model was trained with.
    """
    rope = getattr(text_config, "rope_scaling", None) or getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return
    for key in ("factor", "original_max_position_embeddings"):
        if not rope.get(key):
            raise ValueError(f"config.json's YaRN lacks {key}; export the model again")
    longest = rope["original_max_position_embeddings"] * rope["factor"]
    if round(longest) != text_config.max_position_embeddings:
        raise ValueError(f"max_position_embeddings is {text_config.max_position_embeddings}; YaRN's are {longest:g}")
    unread = [key for key in ("attention_factor", "truncate") if rope.get(key) is not None]
    # transformers fills in what the folder doesn't say: its own default is what TensorRT-LLM computes
    if "truncate" in unread and rope["truncate"]:
        unread.remove("truncate")
    if unread:
        raise ValueError(f"TensorRT-LLM doesn't read YaRN's {unread[0]}; the model would answer otherwise")


def picture(image) -> Image.Image:
    """Pillow's image of what a server has loaded: Pillow's, 8-bit [height, width, 3], or floats [3, height, width]."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, torch.Tensor):
        if image.is_floating_point():  # torchvision's ToTensor divided 8 bits by 255
            image = (image.float() * 255).round().clamp(0, 255).to(torch.uint8)
        image = image.cpu().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(image)


def size(image) -> tuple:
    """(height, width) of what :func:`picture` takes."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    if isinstance(image, torch.Tensor):
        return int(image.shape[-2]), int(image.shape[-1])
    return int(image.shape[0]), int(image.shape[1])
