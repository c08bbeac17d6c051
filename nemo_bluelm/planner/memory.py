"""Bytes on a GPU by part, for one rank of the pipeline, from shapes, layout and precision."""

from dataclasses import dataclass
from typing import NamedTuple

from nemo_bluelm.config.schema import (
    ContextComm,
    Dtype,
    Fp8Recipe,
    LoraModule,
    Part,
    Recipe,
    Recompute,
    geometry_of,
    projector_width,
)
from nemo_bluelm.model.flops import adapter_weights, layer_weights
from nemo_bluelm.planner.teacher import distills, teacher_beside

GIB = 2**30

# What arithmetic alone doesn't give; measured on one H200 with torch 2.11+cu130, Transformer Engine 2.9.0 and
# megatron-core 0.15.3, single runs, language model trained and ViT frozen, packs of one document of 4,096 tokens. The
# rows are in tests/planner/planner_measured.py.
WORKSPACE = 0.5 * GIB  # cuBLAS and TE, and what backward has in hand: 0.5 to 0.7 are left
DELAYED = 1.3 * GIB  # with delayed scaling 1.8 are left
GRAPH_POOLS = 2.0 * GIB  # private pools of the layers' CUDA graphs: 67.7 GiB reserved with, 65.2 without
# Of what ViT and projector keep, another such share: the pools can't be used for them when the layers don't need them.
# 6.4 and 9.4 GiB, in BF16 and with FP8, of 26.4 that packs of photos and text keep when they have the most tiles.
GRAPH_VISION = 0.28
# Reserved by PyTorch's allocator / allocated, at the peak: 1.04 in BF16 (85.4/82.3, 65.2/62.5), 1.07 with FP8
# (87.5/81.8, 88.9/83.0).
FRAGMENTATION = 1.055
# Bytes of each logit that the divergence from a teacher has at its peak, beside both models' logits: counted in
# layers/divergence.py, of all tokens and of the likeliest ones.
DIVERGENCE, TOP_K_DIVERGENCE = 12, 17
OUTSIDE = 1.2 * GIB  # not PyTorch's: CUDA's context 0.5, NCCL's buffers; a guess, not measured


@dataclass(frozen=True)
class Memory:
    """Peak bytes that PyTorch has allocated on one GPU, by what they are for.

    Attributes:
        weights: in the dtype of the recipe.
        gradients: fp32 buffers that are accumulated in and reduced from.
        optimizer: fp32 master weights (BF16 only) and Adam's two moments.
        fp8: FP8 copies of weights, each with its transpose.
        vision: what ViT and projector keep for backward.
        language: what embedding and decoder layers keep for backward.
        logits: output layer, cross entropy, divergence from a teacher.
        teacher: a frozen model beside this one: its weights, and the most that its forward pass has at once.
        overhead: workspaces and CUDA graphs.
    """

    weights: float
    gradients: float
    optimizer: float
    fp8: float
    vision: float
    language: float
    logits: float
    teacher: float
    overhead: float

    @property
    def total(self) -> float:
        """Compare with ``torch.cuda.max_memory_allocated()``."""
        return sum(vars(self).values())

    @property
    def reserved(self) -> float:
        """With what the allocator loses; compare with ``torch.cuda.max_memory_reserved()``."""
        return self.total * FRAGMENTATION

    @property
    def needed(self) -> float:
        """What a GPU must have: ``reserved``, and what CUDA and NCCL take."""
        return self.reserved + OUTSIDE

    def to_dict(self) -> dict[str, float]:
        return {**vars(self), "total": self.total, "reserved": self.reserved, "needed": self.needed}


class Kept(NamedTuple):
    """Bytes a layer keeps for backward, of one token: its input, the attention with its norm, the MLP with its norm."""

    input: float
    attention: float
    mlp: float

    def after(self, recompute: Recompute) -> float:
        if recompute == Recompute.full:
            return self.input
        return self.input + self.attention + (0 if recompute == Recompute.mlp else self.mlp)

    def again(self, recompute: Recompute) -> float:
        """What comes back in backward, a layer at a time."""
        return sum(self) - self.after(recompute)


class Weights(NamedTuple):
    """Parameters by part on one rank."""

    vision: int
    projector: int
    language: int

    def of(self, part: Part) -> int:
        return getattr(self, part.value)


def stage_layers(recipe: Recipe) -> list[int]:
    """Decoder layers on each rank of the pipeline."""
    parallel, layers = recipe.parallel, recipe.model.language.num_layers
    first = parallel.first_stage_layers
    if first is None or parallel.pipeline == 1:
        return [layers // parallel.pipeline] * parallel.pipeline
    return [first] + [(layers - first) // (parallel.pipeline - 1)] * (parallel.pipeline - 1)


def notable_stages(recipe: Recipe) -> list[int]:
    """First, second and last: those between are like the second, with fewer micro-batches in flight."""
    return sorted({0, min(1, recipe.parallel.pipeline - 1), recipe.parallel.pipeline - 1})


def stage_weights(recipe: Recipe, stage: int) -> Weights:
    """Parameters that a rank of stage ``stage`` of the pipeline holds.

    Tensor-parallel ranks share the language model's matrices; ViT and projector are whole on the first stage. With
    tied embeddings first and last stage have a copy each. LoRA's adapters are the language model's.
    """
    model, parallel = recipe.model, recipe.parallel
    vision, text, shape = model.vision, model.language, geometry_of(model)
    h, f, d = vision.hidden_size, vision.ffn_hidden_size, text.hidden_size
    folded, last = shape.merge**2 * h, stage == parallel.pipeline - 1
    in_vision = in_projector = 0
    if stage == 0:
        in_vision = (3 * shape.patch**2 + 1 + shape.patches_per_side**2 + 2) * h
        in_vision += vision.num_layers * (4 * (h + 1) * h + 2 * h * f + f + h + 4 * h)
        in_projector = 2 * folded * model.projector.layer_norm + (folded + 1) * projector_width(model) + (d + 1) * d
    tables = (stage == 0) + (last and not (stage == 0 and text.share_embeddings_and_output_weights))
    matrices = layer_weights(text) + adapter_weights(text, recipe.train.lora)
    norms = 2 * d + 2 * text.kv_channels * text.qk_layernorm
    in_language = stage_layers(recipe)[stage] * (matrices // parallel.tensor + norms)
    return Weights(in_vision, in_projector, in_language + tables * text.vocab_size * d // parallel.tensor + last * d)


def stage_trained(recipe: Recipe, stage: int) -> int:
    """Those of :func:`stage_weights` that are trained: with LoRA the language model's adapters alone."""
    weights = {part: stage_weights(recipe, stage).of(part) for part in Part if part not in recipe.train.freeze}
    lora, text = recipe.train.lora, recipe.model.language
    if lora.rank:
        weights[Part.language] = stage_layers(recipe)[stage] * (adapter_weights(text, lora) // recipe.parallel.tensor)
    return sum(weights.values())


def most_tiles(recipe: Recipe) -> int:
    """The most tiles that a pack can hold."""
    data = recipe.data
    return min(data.max_tiles, (data.sequence_length - 1) // geometry_of(recipe.model).tokens_per_tile)


def micro_batches(recipe: Recipe, data_parallel: int) -> int:
    """Micro-batches of a step on each data-parallel rank."""
    return recipe.train.global_batch_size // (recipe.train.micro_batch_size * data_parallel)


def stage_memory(recipe: Recipe, data_parallel: int, stage: int, tiles: int) -> Memory:
    """Peak bytes of a rank of one pipeline stage.

    The peak is where the last layer's forward is done: everything kept for backward is there, and so are the logits.

    Args:
        recipe: a valid recipe, for GPUs with Transformer Engine.
        data_parallel: model copies.
        stage: of the pipeline, from 0.
        tiles: image tiles in every pack.
    """
    train, parallel, text = recipe.train, recipe.parallel, recipe.model.language
    mixed = recipe.precision.dtype == Dtype.bf16
    size, owned = (2 if mixed else 4), stage_weights(recipe, stage)
    trained = stage_trained(recipe, stage)
    shards = data_parallel * parallel.context if parallel.distributed_optimizer else 1
    tokens = recipe.data.sequence_length * train.micro_batch_size // parallel.context  # of a micro-batch, on this rank
    last = stage == parallel.pipeline - 1
    row = text.hidden_size / (parallel.tensor if parallel.sequence else 1) * size
    # TE's cross entropy puts the logits' gradient in their place.
    logits = text.vocab_size / parallel.tensor * (size + _divergence(recipe)) + 2 * row if last else 0
    vision = _vision(recipe, data_parallel, tiles, size) if stage == 0 else 0
    delayed = DELAYED if recipe.precision.fp8.recipe == Fp8Recipe.delayed else 0
    graphs = GRAPH_POOLS + GRAPH_VISION * vision if train.cuda_graphs else 0
    return Memory(
        weights=sum(owned) * size,
        gradients=trained * 4,
        optimizer=trained * (12 if mixed else 8) / shards,
        fp8=2 * _fp8_weights(recipe, stage),
        vision=vision,
        language=tokens * _language(recipe, data_parallel, stage, tiles, size),
        logits=tokens * logits,
        teacher=_teacher(recipe, data_parallel, tiles),
        overhead=WORKSPACE + delayed + graphs,
    )


def stages_memory(recipe: Recipe, data_parallel: int, tiles: int) -> list[Memory]:
    """:func:`stage_memory` of every stage."""
    return [stage_memory(recipe, data_parallel, stage, tiles) for stage in range(recipe.parallel.pipeline)]


def _divergence(recipe: Recipe) -> int:
    if not distills(recipe):
        return 0
    whole = recipe.distill.teacher is not None and recipe.distill.top_k is None
    return DIVERGENCE if whole else TOP_K_DIVERGENCE


def _teacher(recipe: Recipe, data_parallel: int, tiles: int) -> float:
    beside = teacher_beside(recipe)
    if beside is None:
        return 0
    found = stage_memory(beside, data_parallel, 0, tiles)
    return found.weights + max(found.vision, found.language, found.logits)


def _fp8_weights(recipe: Recipe, stage: int) -> float:
    fp8, model = recipe.precision.fp8, recipe.model
    if fp8.recipe is None:
        return 0
    weights = 0.0
    if Part.language in fp8.parts:
        weights += fp8_layers(recipe, stage) * layer_weights(model.language) / recipe.parallel.tensor
    if Part.vision in fp8.parts and stage == 0:
        h, f = model.vision.hidden_size, model.vision.ffn_hidden_size
        weights += model.vision.num_layers * (4 * h * h + 2 * h * f)
    return weights


def fp8_layers(recipe: Recipe, stage: int) -> int:
    """Decoder layers of a stage that are in FP8; virtual stages are taken for whole ones."""
    if not _is_fp8(recipe, Part.language):
        return 0
    counts, fp8, total = stage_layers(recipe), recipe.precision.fp8, recipe.model.language.num_layers
    start = sum(counts[:stage])
    first, end = max(start, fp8.bf16_first_layers), min(start + counts[stage], total - fp8.bf16_last_layers)
    return max(0, end - first)


def _layer(recipe: Recipe, size: int, fp8: bool) -> Kept:
    """One decoder layer."""
    text, parallel = recipe.model.language, recipe.parallel
    t, c, d = parallel.tensor, parallel.context, text.hidden_size
    row, ffn = d / (t if parallel.sequence else 1), text.ffn_hidden_size / t  # outside attention and MLP, in it
    queries, keys = text.num_attention_heads * text.kv_channels / t, text.num_query_groups * text.kv_channels / t
    lora, is_frozen = recipe.train.lora, Part.language in recipe.train.freeze or recipe.train.lora.rank > 0
    # What a matrix product keeps of its input, which only the gradient of a weight needs, an adapter's too.
    plain = 0 if is_frozen else 1 if fp8 else size
    operand = {module: size if lora.rank and module in lora.modules else plain for module in LoraModule}
    # Queries and keys after RoPE and a copy of the values; TE wants them contiguous, so the projection's output goes,
    # unless its heads are normed.
    qkv = (queries + 2 * keys) * size * (1 + text.qk_layernorm)
    if c > 1 and parallel.context_comm == ContextComm.all_gather:
        qkv += (2 * c + 1) / 2 * 2 * keys * size  # keys and values that this rank's two chunks see
    out = queries * size + 4 * text.num_attention_heads / t + (queries if fp8 and plain else 0)
    return Kept(
        input=row * size,
        attention=row * operand[LoraModule.linear_qkv] + qkv + out,
        mlp=row * (size + operand[LoraModule.linear_fc1]) + ffn * (2 * size + operand[LoraModule.linear_fc2]),
    )


def _language(recipe: Recipe, data_parallel: int, stage: int, tiles: int, size: int) -> float:
    """Bytes of a token of a micro-batch on one rank, decoder layers of all micro-batches in flight and embedding."""
    freeze, recompute, layers = set(recipe.train.freeze), recipe.train.recompute, stage_layers(recipe)[stage]
    if Part.language in freeze and (tiles == 0 or {Part.vision, Part.projector} <= freeze):
        return sum(_layer(recipe, size, False))  # a layer at work, nothing kept
    in_fp8 = fp8_layers(recipe, stage)
    plain, quantised = _layer(recipe, size, False), _layer(recipe, size, True)
    how = recompute.language
    again = layers
    if how == Recompute.full and recompute.language_layers is not None:
        again = min(layers, recompute.language_layers)
    mean = [
        (in_fp8 * quantised.after(way) + (layers - in_fp8) * plain.after(way)) / layers for way in (how, Recompute.none)
    ]
    kept = again * mean[0] + (layers - again) * mean[1]
    kept *= _in_flight(recipe, data_parallel, stage)
    embedding = 3 * recipe.model.language.hidden_size * size if stage == 0 else 0
    return kept + (plain.again(how) if again else 0) + embedding


def _vision(recipe: Recipe, data_parallel: int, tiles: int, size: int) -> float:
    """Bytes that ViT and projector keep on a rank of the first stage."""
    vision, shape, parallel = recipe.model.vision, geometry_of(recipe.model), recipe.parallel
    freeze, d = recipe.train.freeze, recipe.model.language.hidden_size
    ranks = parallel.tensor * parallel.context
    all_tiles = tiles * recipe.train.micro_batch_size
    mine = -(-all_tiles // ranks) if parallel.share_tiles else all_tiles
    flying = min(micro_batches(recipe, data_parallel), parallel.pipeline * (2 if parallel.virtual_pipeline else 1))
    h, f = vision.hidden_size, vision.ffn_hidden_size
    fp8 = _is_fp8(recipe, Part.vision)
    operand = 1 if fp8 else size
    attention = h * operand + 4 * h * size + 4 * vision.num_attention_heads + (h if fp8 else 0)
    layer = Kept(h * size, attention, h * size + h * operand + f * size + f * operand)
    patches, how = shape.patches_per_side**2, recipe.train.recompute.vision
    if Part.vision in freeze:
        held, working = 0.0, patches * sum(layer)
    else:
        held, working = patches * vision.num_layers * layer.after(how), patches * layer.again(how)
    if not {Part.vision, Part.projector} <= set(freeze):
        # Inputs of the norm and of the first layer; what that makes, the second's input, its output, and of a gated
        # activation silu(gate).
        width, inputs = projector_width(recipe.model), 1 + recipe.model.projector.layer_norm
        inner = width + 2 * d + (d if width > d else 0)
        held += shape.tokens_per_tile * (inputs * shape.merge**2 * h + inner) * size
    gathered = all_tiles * shape.tokens_per_tile * d * size if parallel.share_tiles and ranks > 1 else 0
    return mine * (flying * held + working) + gathered


def _is_fp8(recipe: Recipe, part: Part) -> bool:
    return recipe.precision.fp8.recipe is not None and part in recipe.precision.fp8.parts


def _in_flight(recipe: Recipe, data_parallel: int, stage: int) -> float:
    """Micro-batches whose forward is done and backward is not, counted in this rank's whole part of the model."""
    stages, chunks = recipe.parallel.pipeline, recipe.parallel.virtual_pipeline
    count = micro_batches(recipe, data_parallel)
    if chunks is None:
        return min(count, stages - stage)
    return min(count, ((stages - stage - 1) * 2 + (chunks - 1) * stages + 1) / chunks)
