"""Width pruning: a narrower language model out of a wider one, by what its activations say of each part.

The parts are channels of the residual stream, attention heads and MLP neurons; the layers stay. Their importance is
the mean over tokens of the size of their activations on a few packs (Minitron, arXiv 2407.14679, section 2.2).
ModelOpt's ``mcore_minitron`` does not fit: it cuts Megatron-Core's own norms only, not ``torch.nn.RMSNorm`` or
Transformer Engine's, and it can't go from many groups of few heads to few groups of many.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nemo_bluelm.config.schema import LanguageConfig, ModelConfig
from nemo_bluelm.data.packs import PackedBatch
from nemo_bluelm.errors import UserError
from nemo_bluelm.model.bluelm import BlueLMModel

# Must be equal in both models; kv_channels and rotary_base because RoPE turns channels of a head at frequencies of
# their own.
_EQUAL = (
    *("vision", "projector", "geometry.tile", "geometry.patch", "geometry.merge"),
    *("language.num_layers", "language.kv_channels", "language.vocab_size"),
    *("language.rotary_base", "language.layernorm_epsilon", "language.qk_layernorm"),
)
_NARROWER = ("language.hidden_size", "language.ffn_hidden_size", "language.num_attention_heads")


@dataclass
class Importance:
    """Mean activations, float64 on the CPU; larger is more important.

    Attributes:
        hidden: [hidden], |output| of all RMSNorms, summed over them: the residual stream is one for all layers.
        heads: [layers, heads], the L2 norm of a head's output.
        ffn: [layers, ffn], |activation| of a neuron after SwiGLU.
    """

    hidden: Tensor
    heads: Tensor
    ffn: Tensor


@dataclass
class Kept:
    """What the narrower model keeps: indices into the wider one, int64 on the CPU, ascending but for ``heads``.

    Attributes:
        hidden: [student hidden].
        heads: [layers, student groups, heads of a group]; heads that will share one key and value.
        ffn: [layers, student ffn].
    """

    hidden: Tensor
    heads: Tensor
    ffn: Tensor


def check_shapes(teacher: ModelConfig, student: ModelConfig) -> None:
    """Refuse a student that the teacher can't be cut to.

    Raises:
        UserError: naming the key and both values.
    """
    for key in _EQUAL:
        wide, narrow = _get(teacher, key), _get(student, key)
        if wide != narrow:
            raise UserError(f"model.{key} is {narrow}, but the teacher has {wide}; pruning keeps it, make them equal")
    for key in _NARROWER:
        wide, narrow = _get(teacher, key), _get(student, key)
        if narrow > wide:
            raise UserError(f"model.{key} is {narrow}, more than the teacher's {wide}; it must be at most that")


@torch.no_grad()
def measure(model: BlueLMModel, packs: Iterable[PackedBatch]) -> Importance:
    """Importance of the parts of a model of local layers, whole in this process.

    Args:
        packs: on the model's device; their padding does not count.
    """
    language, layers = model.language, model.language.decoder.layers
    shape = language.config
    hidden = torch.zeros(shape.hidden_size, dtype=torch.float64)
    heads = torch.zeros(shape.num_layers, shape.num_attention_heads, dtype=torch.float64)
    ffn = torch.zeros(shape.num_layers, shape.ffn_hidden_size, dtype=torch.float64)
    real, tokens = torch.empty(0, dtype=torch.bool), 0

    def add(total: Tensor, sizes: Tensor) -> None:
        total += sizes.flatten(0, 1)[real].double().sum(0).cpu()

    def norm(module, inputs, output) -> None:
        add(hidden, output.abs())

    def attention(layer: int, module, inputs) -> None:
        add(heads[layer], inputs[0].unflatten(-1, (shape.num_attention_heads, -1)).norm(dim=-1))

    def mlp(layer: int, module, inputs) -> None:
        add(ffn[layer], inputs[0].abs())

    hooks = [language.decoder.final_layernorm.register_forward_hook(norm)]
    for number, layer in enumerate(layers):
        hooks += [part.register_forward_hook(norm) for part in (layer.input_layernorm, layer.pre_mlp_layernorm)]
        hooks.append(layer.self_attention.linear_proj.register_forward_pre_hook(partial(attention, number)))
        hooks.append(layer.mlp.linear_fc2.register_forward_pre_hook(partial(mlp, number)))
    try:
        for pack in packs:
            real = _real_rows(pack)
            tokens += int(real.sum())
            model(pack)
    finally:
        for hook in hooks:
            hook.remove()
    return Importance(hidden / tokens, heads / tokens, ffn / tokens)


def choose(importance: Importance, teacher: LanguageConfig, student: LanguageConfig) -> Kept:
    """The most important parts, as many as the student has; ties go to the lower index."""
    heads = [_choose_heads(row, teacher.num_query_groups, student) for row in importance.heads]
    return Kept(
        hidden=_top(importance.hidden, student.hidden_size),
        heads=torch.stack(heads),
        ffn=torch.stack([_top(row, student.ffn_hidden_size) for row in importance.ffn]),
    )


@torch.no_grad()
def cut(model: BlueLMModel, kept: Kept, tied: bool) -> dict[str, Tensor]:
    """The student's weights: what is kept of the teacher's, otherwise unchanged.

    A student's group of heads has the mean of the keys and values of their old groups (as GQA is made of multi-head
    attention, arXiv 2305.13245). ViT and projector are kept, the projector's layers cut to the kept channels.

    Args:
        model: the teacher, of local layers, whole in this process.
        tied: the student's output layer is its embedding. That of a teacher with two is then left out; a student with
            two gets a copy of a tied teacher's one.

    Returns:
        Its state dict by the names of local layers.
    """
    state = {name: weight for name, weight in model.state_dict().items() if isinstance(weight, Tensor)}
    shape, channels = model.language.config, kept.hidden.to(next(model.parameters()).device)
    result = {name: weight for name, weight in state.items() if not name.startswith("language.")}
    result["projector.linear_fc2.bias"] = state["projector.linear_fc2.bias"][channels]
    for name in ("projector.linear_fc1.weight", "projector.linear_fc1.bias"):
        halves = state[name].unflatten(0, (-1, shape.hidden_size))  # one, or two of a gated layer
        result[name] = halves[:, channels].flatten(0, 1)
    result["projector.linear_fc2.weight"] = state["projector.linear_fc2.weight"][channels][:, channels]

    embedding = "language.embedding.word_embeddings.weight"
    output = "language.output_layer.weight"
    result[embedding] = state[embedding][:, channels]
    if not tied:
        result[output] = state.get(output, state[embedding])[:, channels]
    result["language.decoder.final_layernorm.weight"] = state["language.decoder.final_layernorm.weight"][channels]
    for number in range(shape.num_layers):
        prefix = f"language.decoder.layers.{number}."
        heads, ffn = kept.heads[number].to(channels.device), kept.ffn[number].to(channels.device)
        qkv = state[f"{prefix}self_attention.linear_qkv.weight"]
        proj = state[f"{prefix}self_attention.linear_proj.weight"].unflatten(1, (-1, shape.kv_channels))
        fc1 = state[f"{prefix}mlp.linear_fc1.weight"].unflatten(0, (2, -1))  # gate, then linear
        for norm in ("input_layernorm", "pre_mlp_layernorm"):
            result[f"{prefix}{norm}.weight"] = state[f"{prefix}{norm}.weight"][channels]
        if shape.qk_layernorm:  # of a head's channels, which stay
            for norm in ("self_attention.q_layernorm", "self_attention.k_layernorm"):
                result[f"{prefix}{norm}.weight"] = state[f"{prefix}{norm}.weight"]
        result[f"{prefix}self_attention.linear_qkv.weight"] = _cut_qkv(
            qkv[:, channels], heads, shape.num_query_groups, shape.kv_channels
        )
        result[f"{prefix}self_attention.linear_proj.weight"] = proj[channels][:, heads.flatten()].flatten(1)
        result[f"{prefix}mlp.linear_fc1.weight"] = fc1[:, ffn][:, :, channels].flatten(0, 1)
        result[f"{prefix}mlp.linear_fc2.weight"] = state[f"{prefix}mlp.linear_fc2.weight"][channels][:, ffn]
    return result


def _cut_qkv(weight: Tensor, heads: Tensor, groups: int, size: int) -> Tensor:
    """Megatron-Core's fused weight, for each group its queries, its key and its value, with other groups.

    Args:
        weight: [(heads + 2 * groups) * size, hidden].
        heads: int64 [new groups, heads of a group].
    """
    parts = weight.unflatten(0, (groups, -1, size))
    query, key, value = parts[:, :-2], parts[:, -2], parts[:, -1]
    origin = heads // query.size(1)  # old group of each head
    query = query.flatten(0, 1)[heads]
    means = [part[origin].double().mean(1, keepdim=True).to(weight.dtype) for part in (key, value)]
    return torch.cat([query, *means], 1).flatten(0, 2)


def _choose_heads(importance: Tensor, groups: int, student: LanguageConfig) -> Tensor:
    """int64 [student groups, heads of a group].

    Where the teacher's groups are large and many enough, each of the student's is cut out of one, so that its key and
    value are exact. Otherwise the best heads are taken and neighbours put together.
    """
    size, count = student.num_attention_heads // student.num_query_groups, student.num_query_groups
    of_group = importance.unflatten(0, (groups, -1))
    slots = of_group.size(1) // size  # groups that can be cut out of one
    if groups * slots >= count:
        best = of_group.argsort(dim=1, descending=True, stable=True)[:, : slots * size]
        heads = best + torch.arange(groups).unsqueeze(1) * of_group.size(1)
        heads = heads.unflatten(1, (slots, size)).flatten(0, 1)
        chosen = _top(importance[heads].sum(1), count)
        return heads[chosen].sort(1).values
    return _top(importance, count * size).unflatten(0, (count, size))


def _top(importance: Tensor, count: int) -> Tensor:
    return importance.argsort(descending=True, stable=True)[:count].sort().values


def _real_rows(pack: PackedBatch) -> Tensor:
    """bool [S]: tokens of documents, not padding."""
    starts, real = pack.cu_seqlens_padded.tolist(), pack.cu_seqlens.diff().tolist()
    rows = torch.zeros(pack.tokens.size(1), dtype=torch.bool, device=pack.tokens.device)
    for start, length in zip(starts, real):
        rows[start : start + length] = True
    return rows


def _get(model: ModelConfig, key: str):
    value = model
    for name in key.split("."):
        value = getattr(value, name)
    return value
