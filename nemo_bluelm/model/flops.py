"""Model FLOPs of a micro-batch, by arithmetic, and the peak rates of GPUs. No torch."""

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache
from typing import Optional

from nemo_bluelm.config.schema import (
    LanguageConfig,
    LoraConfig,
    LoraModule,
    ModelConfig,
    Part,
    geometry_of,
    projector_width,
)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of matrix products, forward and backward; a multiply-add is two.

    Attributes:
        vision_patches: patch embedding.
        vision_linear: linear layers of the ViT.
        vision_attention: full attention among the patches of a tile.
        projector: its two linear layers.
        linear: linear layers of the language model's decoder layers.
        adapters: LoRA's, beside those.
        attention: causal attention inside each document.
        output: output layer; tied weights count too, the embedding's look-up is free.
    """

    vision_patches: int = 0
    vision_linear: int = 0
    vision_attention: int = 0
    projector: int = 0
    linear: int = 0
    adapters: int = 0
    attention: int = 0
    output: int = 0

    @property
    def total(self) -> int:
        return sum(astuple(self))

    @property
    def vision(self) -> int:
        """What the tiles cost before the language model."""
        return self.vision_patches + self.vision_linear + self.vision_attention + self.projector

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other))))

    def to_dict(self) -> dict[str, int]:
        """Each part and the total."""
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "total": self.total}


def pack_flops(
    model: ModelConfig,
    segments: Sequence[int],
    tiles: int,
    frozen: Collection[Part] = (),
    lora: Optional[LoraConfig] = None,
) -> Flops:
    """Model FLOPs of one micro-batch, forward and backward.

    Only what the model needs counts: no padding, no recomputation, and of causal attention the half that is not
    masked, ``l^2 / 2`` pairs for a document of ``l`` tokens. For one document that is ``6 * N + 6 * layers * l * h`` a
    token, with N the weights in matrix products (the convention of PaLM, arXiv 2204.02311, appendix B, with the causal
    half taken). Backward is twice forward: the gradients of the input and of the weights. A frozen part counts its
    forward, and its input's gradient if something trained lies below it; the pixels need no gradient. With LoRA the
    language model is frozen, and adapters lie in its layers; Megatron's modules compute their inputs' gradients always.

    Args:
        model: shapes.
        segments: real tokens of each document; zeros are allowed.
        tiles: image tiles, the thumbnails counted.
        frozen: parts that are not trained.
        lora: the language model's adapters; None or rank 0 for none.
    """
    vision, text, shape = model.vision, model.language, geometry_of(model)
    trains = {part: part not in frozen for part in Part}
    # Passes over each weight: forward, the input's gradient, the weights' gradient.
    sees = tiles > 0 and trains[Part.vision]
    in_vision = 3 if trains[Part.vision] else 1
    # Gradients go through the projector's first layer to the ViT, or to its norm.
    projects = trains[Part.projector]
    in_fc1 = 1 + projects + (sees or (projects and model.projector.layer_norm))
    in_fc2 = 1 + projects + (sees or projects)
    below = tiles > 0 and (trains[Part.vision] or trains[Part.projector])
    lora = lora or LoraConfig()
    weights_learn = trains[Part.language] and not lora.rank
    # Gradients reach the first layer's first adapter, or its input; the layers above always have some below.
    first = _layer_passes(text, lora, weights_learn, below or weights_learn)
    above = _layer_passes(text, lora, weights_learn, below or trains[Part.language])
    in_linear, in_attention = (one + (text.num_layers - 1) * other for one, other in zip(first, above))
    in_output = 1 + (2 if weights_learn else 1 if below or lora.rank else 0)

    patches, h = shape.patches_per_side**2, vision.hidden_size
    folded, d = shape.merge**2 * h, text.hidden_size
    tokens, pairs = sum(segments), sum(length * length for length in segments)
    return Flops(
        vision_patches=min(in_vision, 2) * 2 * tiles * patches * 3 * shape.patch**2 * h,
        vision_linear=in_vision
        * 2
        * tiles
        * patches
        * vision.num_layers
        * (4 * h * h + 2 * h * vision.ffn_hidden_size),
        vision_attention=in_vision * 4 * tiles * patches**2 * vision.num_layers * h,
        projector=2 * tiles * shape.tokens_per_tile * (in_fc1 * folded * projector_width(model) + in_fc2 * d * d),
        linear=2 * tokens * in_linear,
        adapters=3 * 2 * tokens * text.num_layers * adapter_weights(text, lora),
        attention=in_attention * 2 * pairs * text.num_attention_heads * text.kv_channels,
        output=in_output * 2 * tokens * text.vocab_size * d,
    )


def _layer_passes(text: LanguageConfig, lora: LoraConfig, weights_learn: bool, below: bool) -> tuple[int, int]:
    """Passes over a decoder layer: its weights, each as often as it is used, and attention's.

    Args:
        below: whether the layer's input needs a gradient.
    """
    weights = attention = 0
    for module, (inputs, outputs) in linear_shapes(text).items():
        if module == LoraModule.linear_proj:
            attention = 3 if below else 1  # no weights: both gradients are inputs'
        weights += (1 + below + weights_learn) * inputs * outputs
        below = below or (lora.rank > 0 and module in lora.modules)
    return weights, attention


def linear_shapes(language: LanguageConfig) -> dict[LoraModule, tuple[int, int]]:
    """Channels in and out of a decoder layer's linear layers, in the order in which it does them."""
    d, f, queries = language.hidden_size, language.ffn_hidden_size, language.num_attention_heads * language.kv_channels
    return {
        LoraModule.linear_qkv: (d, queries + 2 * language.num_query_groups * language.kv_channels),
        LoraModule.linear_proj: (queries, d),
        LoraModule.linear_fc1: (d, 2 * f),
        LoraModule.linear_fc2: (f, d),
    }


def layer_weights(language: LanguageConfig) -> int:
    """Weights in matrix products of one decoder layer."""
    return sum(inputs * outputs for inputs, outputs in linear_shapes(language).values())


def adapter_weights(language: LanguageConfig, lora: LoraConfig) -> int:
    """Weights of one decoder layer's adapters, none without LoRA."""
    return lora.rank * sum(sum(shape) for module, shape in linear_shapes(language).items() if module in lora.modules)


# Dense BF16 FLOP/s of the tensor cores, from NVIDIA's data sheets; where those print only the figure "with sparsity",
# half of it. The first entry all of whose words stand in the device's name counts, so variants come before plain names.
_PEAKS = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("GH200", 989.4e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.4e12),
    ("H100 NVL", 835.5e12),
    ("H100 PCIe", 756.5e12),
    ("H100", 989.4e12),
    ("H800 PCIe", 756.5e12),
    ("H800", 989.4e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L4", 121e12),
)


@cache
def peak_flops(device_name: str) -> Optional[float]:
    """Dense BF16 FLOP/s that a device can do at most; None if it is not known, as for a CPU.

    Args:
        device_name: as ``torch.cuda.get_device_name()`` gives it, for example "NVIDIA H100 80GB HBM3".
    """
    words = set(device_name.replace("-", " ").split())
    if "MIG" in words:  # a part of the GPU, whose share the name doesn't tell
        return None
    for name, peak in _PEAKS:
        if words.issuperset(name.split()):
            return peak
    return None
