"""Every tensor of the model, once: its name and form in our checkpoints and in Hugging Face's layout.

A row serves both directions and every layer. Nothing here reads a file, so a tensor is converted wherever it is from.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from nemo_bluelm.config.schema import ModelConfig, Part, geometry_of, projector_width


@dataclass(frozen=True)
class Row:
    """One tensor of ours, made of one or more of theirs.

    Attributes:
        ours: name in a checkpoint behind the part's; ``{layer}`` where each layer has a name of its own.
        theirs: names behind the layout's prefix of the part, or whole ones where they start with ``/``.
        shapes: of ``theirs``, one each: letters of :func:`sizes`, in order, with blanks between.
        groups: letter; ours has a group's rows of the first of theirs, then of the second, ..., then the next group's.
        layers: there is one for each layer.
        stacked: layers of ours lie in one tensor, along a first axis.
        exists: whether a model has it; None: every one.
    """

    part: Part
    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[str, ...]
    groups: str = "1"
    layers: bool = False
    stacked: bool = False
    exists: Optional[Callable[[ModelConfig], bool]] = None


def _vision_layer(ours: str, theirs: Sequence[str], shapes: Sequence[str], groups: str = "1") -> Iterator[Row]:
    for kind in ("weight", "bias"):
        yield Row(
            Part.vision,
            f"blocks.layers.{{layer}}.{ours}{kind}",
            tuple(f"encoder.layers.{{layer}}.{name}.{kind}" for name in theirs),
            tuple(shape if kind == "weight" else shape.split()[0] for shape in shapes),
            groups,
            layers=True,
        )


def _language_layer(
    ours: str,
    theirs: Sequence[str],
    shapes: Sequence[str],
    groups: str = "1",
    exists: Optional[Callable[[ModelConfig], bool]] = None,
) -> Row:
    names = tuple(f"layers.{{layer}}.{name}.weight" for name in theirs)
    ours = f"decoder.layers.{ours}weight"
    return Row(Part.language, ours, names, tuple(shapes), groups, layers=True, stacked=True, exists=exists)


def _projector(
    ours: str, theirs: str, shape: str, exists: Optional[Callable[[ModelConfig], bool]] = None
) -> Iterator[Row]:
    for kind, letters in (("weight", shape), ("bias", shape.split()[0])):
        yield Row(Part.projector, f"{ours}.{kind}", (f"{theirs}.{kind}",), (letters,), exists=exists)


def _normed(model: ModelConfig) -> bool:
    return model.projector.layer_norm


def _untied(model: ModelConfig) -> bool:
    return not model.language.share_embeddings_and_output_weights


def _normed_heads(model: ModelConfig) -> bool:
    return model.language.qk_layernorm


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

TABLE = (
    Row(Part.vision, "patch_embedding.weight", ("embeddings.patch_embedding.weight",), ("h c p p",)),
    Row(Part.vision, "patch_embedding.bias", ("embeddings.patch_embedding.bias",), ("h",)),
    Row(Part.vision, "position_embedding", ("embeddings.position_embedding.weight",), ("n h",)),
    *_vision_layer("self_attention.linear_qkv.layer_norm_", ["layer_norm1"], ["h"]),
    *_vision_layer("self_attention.linear_qkv.", _QKV, ["h h"] * 3, "a"),
    *_vision_layer("self_attention.linear_proj.", ["self_attn.out_proj"], ["h h"]),
    *_vision_layer("mlp.linear_fc1.layer_norm_", ["layer_norm2"], ["h"]),
    *_vision_layer("mlp.linear_fc1.", ["mlp.fc1"], ["f h"]),
    *_vision_layer("mlp.linear_fc2.", ["mlp.fc2"], ["h f"]),
    Row(Part.vision, "blocks.final_layernorm.weight", ("post_layernorm.weight",), ("h",)),
    Row(Part.vision, "blocks.final_layernorm.bias", ("post_layernorm.bias",), ("h",)),
    *_projector("norm", "norm", "d", _normed),
    *_projector("linear_fc1", "linear_1", "P d"),
    *_projector("linear_fc2", "linear_2", "H H"),
    Row(Part.language, "embedding.word_embeddings.weight", ("embed_tokens.weight",), ("V H",)),
    _language_layer("self_attention.linear_qkv.layer_norm_", ["input_layernorm"], ["H"]),
    _language_layer("self_attention.linear_qkv.", _QKV, ["Q H", "K H", "K H"], "G"),
    _language_layer("self_attention.q_layernorm.", ["self_attn.q_norm"], ["k"], exists=_normed_heads),
    _language_layer("self_attention.k_layernorm.", ["self_attn.k_norm"], ["k"], exists=_normed_heads),
    _language_layer("self_attention.linear_proj.", ["self_attn.o_proj"], ["H Q"]),
    _language_layer("mlp.linear_fc1.layer_norm_", ["post_attention_layernorm"], ["H"]),
    _language_layer("mlp.linear_fc1.", ["mlp.gate_proj", "mlp.up_proj"], ["F H", "F H"]),
    _language_layer("mlp.linear_fc2.", ["mlp.down_proj"], ["H F"]),
    Row(Part.language, "decoder.final_layernorm.weight", ("norm.weight",), ("H",)),
    Row(Part.language, "output_layer.weight", ("/lm_head.weight",), ("V H",), exists=_untied),
)
# Megatron-Core's layers keep Transformer Engine's state beside these weights; without FP8 there is none.
STATES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")

# Prefixes of the parts. Hub-style names, which transformers 4.57 and 5 both read, are those of our own exports.
EXPORT = {
    Part.vision: "model.vision_tower.vision_model.",
    Part.projector: "model.multi_modal_projector.",
    Part.language: "model.language_model.",
}
LLAMA = {Part.language: "model."}
SIGLIP = {Part.vision: "vision_model."}
SIGLIP_BARE = {Part.vision: ""}  # what transformers 5 writes


class Entry(NamedTuple):
    """A row at one layer of a model.

    Attributes:
        ours: name in a checkpoint, the part's included.
        layer: index into its first axis; None where it has none.
        shape: of the tensor or of that layer of it.
        layers: length of that axis.
        theirs, shapes: names and shapes in the layout.
    """

    part: Part
    ours: str
    layer: Optional[int]
    shape: tuple[int, ...]
    layers: int
    theirs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    groups: int
    vocabulary: bool

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors of ``theirs`` as one of ``shape``."""
        if len(tensors) == 1:
            return tensors[0]
        return torch.cat([tensor.unflatten(0, (self.groups, -1)) for tensor in tensors], 1).flatten(0, 1)

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        """The inverse; a copy where there are several."""
        if len(self.theirs) == 1:
            return [tensor]
        rows = [shape[0] // self.groups for shape in self.shapes]
        pieces = tensor.unflatten(0, (self.groups, -1)).split(rows, 1)
        return [piece.flatten(0, 1).contiguous() for piece in pieces]


def entries(model: ModelConfig, layout: Mapping[Part, str]) -> Iterator[Entry]:
    """Every tensor of the layout's parts, layer by layer.

    Args:
        layout: the prefix of each part that is to be converted.
    """
    letters = sizes(model)
    counts = {Part.vision: model.vision.num_layers, Part.language: model.language.num_layers}
    for layered, rows in _runs(row for row in TABLE if row.part in layout):
        for layer in range(counts[rows[0].part]) if layered else (None,):
            for row in rows:
                if row.exists and not row.exists(model):
                    continue
                shapes = tuple(tuple(letters[letter] for letter in shape.split()) for shape in row.shapes)
                yield Entry(
                    part=row.part,
                    ours=f"{row.part.value}.{row.ours}".format(layer=layer),
                    layer=layer if row.stacked else None,
                    shape=(sum(shape[0] for shape in shapes), *shapes[0][1:]),
                    layers=counts[row.part] if row.stacked else 1,
                    theirs=tuple(_theirs(name, layout[row.part]).format(layer=layer) for name in row.theirs),
                    shapes=shapes,
                    groups=letters[row.groups],
                    vocabulary=row.shapes[0].startswith("V"),
                )


def states(model: ModelConfig, parts: Iterable[Part]) -> Iterator[str]:
    """Keys of the objects that a checkpoint of these parts holds beside the tensors; each is None."""
    for part in parts:
        if part is Part.vision:
            for layer in range(model.vision.num_layers):
                yield from (f"vision.blocks.layers.{layer}.{name}._extra_state/shard_0_1" for name in STATES)
        if part is Part.language:
            count = model.language.num_layers
            for layer in range(count):
                yield from (f"language.decoder.layers.{name}._extra_state/shard_{layer}_{count}" for name in STATES)


def sizes(model: ModelConfig) -> dict[str, int]:
    """What the letters of :data:`TABLE` stand for; small ones are the ViT's, but ``d``, a folded patch's channels, and
    ``k``, those of the language model's heads."""
    vision, language, geometry = model.vision, model.language, geometry_of(model)
    return {
        "1": 1,
        "c": 3,
        "p": geometry.patch,
        "n": geometry.patches_per_side**2,
        "h": vision.hidden_size,
        "f": vision.ffn_hidden_size,
        "a": vision.num_attention_heads,
        "d": vision.hidden_size * geometry.merge**2,
        "P": projector_width(model),
        "V": language.vocab_size,
        "H": language.hidden_size,
        "F": language.ffn_hidden_size,
        "Q": language.num_attention_heads * language.kv_channels,
        "K": language.num_query_groups * language.kv_channels,
        "G": language.num_query_groups,
        "k": language.kv_channels,
    }


def count_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Of a tensor."""
    return prod(shape) * dtype.itemsize


def _theirs(name: str, prefix: str) -> str:
    return name[1:] if name.startswith("/") else prefix + name


def _runs(rows: Iterable[Row]) -> Iterator[tuple[bool, list[Row]]]:
    """Neighbours of one part that are layered, or not: a layer's rows together, so that it is done before the next."""
    run: list[Row] = []
    for row in rows:
        if run and (run[0].layers, run[0].part) != (row.layers, row.part):
            yield run[0].layers, run
            run = []
        run.append(row)
    if run:
        yield run[0].layers, run
