"""Checks across keys: what a type can't say. Each failure is one line with the key, the value and the way out."""

import math
from typing import Iterator

from nemo_bluelm.config.schema import DecodeBackend, DecodeDevice, Part, Recipe, Schedule, geometry_of
from nemo_bluelm.errors import UserError


def check_recipe(recipe: Recipe, world_size: int | None) -> None:
    """Refuse a recipe that cannot train.

    Args:
        recipe: a complete recipe.
        world_size: number of ranks it will run on; None leaves out what depends on it.

    Raises:
        UserError: the first thing that is wrong.
    """
    for check in (_ranges, _names, _mixture, _vision, _language, _context, _layout, _schedule, _freeze):
        for message in check(recipe):
            raise UserError(message)
    if world_size is not None:
        for message in _world(recipe, world_size):
            raise UserError(message)


def check_machine(recipe: Recipe) -> None:
    """Refuse a recipe that needs what this machine lacks; torch is imported only when the recipe asks for it.

    Raises:
        UserError: a GPU-only setting without a CUDA device.
    """
    wants_gpu = {
        "parallel.distributed_optimizer is true": (recipe.parallel.distributed_optimizer, "false"),
        "data.decode.device is gpu": (recipe.data.decode.device == DecodeDevice.gpu, "cpu"),
    }
    for what, (wanted, instead) in wants_gpu.items():
        if wanted:
            import torch

            if not torch.cuda.is_available():
                key = what.split()[0]
                raise UserError(f"{what} and this machine has no CUDA device; set {key}={instead}")


def alignment(recipe: Recipe) -> int:
    """Tokens to a multiple of which every segment of a pack is padded.

    Context parallelism cuts each segment into 2 * context chunks, a pair per rank.
    """
    context = recipe.parallel.context
    return 2 * context if context > 1 else 1


# Key -> (smallest allowed value, whether that value itself is allowed).
_LIMITS = {
    "model.vision.num_layers": (1, True),
    "model.vision.hidden_size": (1, True),
    "model.vision.ffn_hidden_size": (1, True),
    "model.vision.num_attention_heads": (1, True),
    "model.vision.layernorm_epsilon": (0, False),
    "model.language.num_layers": (1, True),
    "model.language.hidden_size": (1, True),
    "model.language.ffn_hidden_size": (1, True),
    "model.language.num_attention_heads": (1, True),
    "model.language.num_query_groups": (1, True),
    "model.language.kv_channels": (2, True),
    "model.language.vocab_size": (1, True),
    "model.language.layernorm_epsilon": (0, False),
    "model.language.rotary_base": (1, True),
    "model.language.init_method_std": (0, False),
    "model.language.yarn.factor": (1, True),
    "model.language.yarn.original_max_position_embeddings": (1, True),
    "data.sequence_length": (1, True),
    "data.max_tiles": (1, True),
    "data.max_bad_fraction": (0, True),
    "data.decode.threads": (0, True),
    "data.decode.prefetch": (0, True),
    "parallel.tensor": (1, True),
    "parallel.pipeline": (1, True),
    "parallel.virtual_pipeline": (2, True),
    "parallel.first_stage_layers": (1, True),
    "parallel.context": (1, True),
    "optim.lr": (0, False),
    "optim.min_lr": (0, True),
    "optim.warmup_steps": (0, True),
    "optim.weight_decay": (0, True),
    "optim.beta1": (0, True),
    "optim.beta2": (0, True),
    "optim.eps": (0, False),
    "optim.clip_grad": (0, True),
    "train.steps": (1, True),
    "train.global_batch_size": (1, True),
    "train.save_every": (1, True),
    "train.log_every": (1, True),
    "seed": (0, True),
}


def _ranges(recipe: Recipe) -> Iterator[str]:
    for key, (least, included) in _LIMITS.items():
        value = _get(recipe, key)
        if value is None:
            continue
        # Written so that nan fails; inf is no training value either.
        if not (value >= least if included else value > least) or math.isinf(value):
            wanted = f"{least} or more" if included else f"greater than {least}"
            yield f"{key} is {value}; it must be {wanted}" + (" and finite" if isinstance(value, float) else "")
    if recipe.data.max_bad_fraction > 1:
        yield f"data.max_bad_fraction is {recipe.data.max_bad_fraction}; it must be at most 1"
    for key in ("optim.beta1", "optim.beta2"):
        if _get(recipe, key) >= 1:
            yield f"{key} is {_get(recipe, key)}; it must be below 1"
    keep = recipe.train.keep_checkpoints
    if keep == 0 or keep < -1:
        yield f"train.keep_checkpoints is {keep}; it must be 1 or more, or -1 to keep all"


def _names(recipe: Recipe) -> Iterator[str]:
    if not recipe.name.strip() or "/" in recipe.name:
        yield f"name is {recipe.name!r}; it must be a word without '/', it names the run's folder"
    for key in ("run_dir", "data.root", "data.tokenizer", "data.index"):
        if not _get(recipe, key).strip():
            yield f"{key} is empty; it must be a path"
    if recipe.init_from is not None and not recipe.init_from.strip():
        yield "init_from is empty; it must be a run or checkpoint folder, or null"


def _mixture(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if not data.sources:
        yield "data.sources is empty; it must have at least one source, for example {text: {shards: [text-*.tar]}}"
    for name, source in data.sources.items():
        key = f"data.sources.{name}"
        if not source.shards:
            yield f"{key}.shards is empty; it must list WebDataset tars, JSONL files or globs"
        if not 0 < source.weight < math.inf:
            yield f"{key}.weight is {source.weight}; it must be greater than 0, ~{key} leaves a source out"
        if source.max_epochs is not None and not 0 < source.max_epochs < math.inf:
            yield f"{key}.max_epochs is {source.max_epochs}; it must be greater than 0, or null for no limit"
        for tag, factor in source.resample.items():
            if not 0 <= factor < math.inf:
                yield f"{key}.resample.{tag} is {factor}; it must be 0 or more"
    if data.decode.device == DecodeDevice.gpu and data.decode.backend != DecodeBackend.dali:
        yield (
            f"data.decode.device is gpu, but the backend {data.decode.backend.value} works on the CPU; "
            "set data.decode.backend=dali or data.decode.device=cpu"
        )


def _vision(recipe: Recipe) -> Iterator[str]:
    vision, shape = recipe.model.vision, geometry_of(recipe.model)
    if vision.hidden_size % vision.num_attention_heads:
        yield _not_multiple(
            "model.vision.hidden_size", vision.hidden_size, "num_attention_heads", vision.num_attention_heads
        )
    if shape.tokens_per_tile >= recipe.data.sequence_length:
        yield (
            f"data.sequence_length is {recipe.data.sequence_length}; one tile is {shape.tokens_per_tile} tokens, "
            f"it must be {shape.tokens_per_tile + 1} or more"
        )


def _language(recipe: Recipe) -> Iterator[str]:
    language = recipe.model.language
    heads, groups = language.num_attention_heads, language.num_query_groups
    if heads % groups:
        yield (
            f"model.language.num_query_groups is {groups}; it must divide num_attention_heads {heads}, "
            f"the nearest is {_nearest_divisor(heads, groups)}"
        )
    if language.kv_channels % 2:
        yield f"model.language.kv_channels is {language.kv_channels}; RoPE turns pairs of channels, it must be even"


def _context(recipe: Recipe) -> Iterator[str]:
    yarn, length = recipe.model.language.yarn, recipe.data.sequence_length
    reach = yarn.original_max_position_embeddings * yarn.factor
    if length > reach:
        needed = math.ceil(length / yarn.original_max_position_embeddings)
        yield (
            f"data.sequence_length is {length}, longer than the {reach:g} positions RoPE was trained for "
            f"(original_max_position_embeddings x factor); set model.language.yarn.factor={needed} or shorten the packs"
        )


def _layout(recipe: Recipe) -> Iterator[str]:
    yield from _tensor(recipe)
    yield from _pipeline(recipe)
    parallel, length = recipe.parallel, recipe.data.sequence_length
    if parallel.sequence and parallel.tensor == 1:
        yield "parallel.sequence is true with parallel.tensor 1; set it to false, or parallel.tensor to 2 or more"
    # A rank holds length / context tokens, and sequence parallelism cuts those again.
    parts = (2 * parallel.context if parallel.context > 1 else 1) * (parallel.tensor if parallel.sequence else 1)
    if length % parts:
        why = " * ".join(["2 * parallel.context"] * (parallel.context > 1) + ["parallel.tensor"] * parallel.sequence)
        yield _not_multiple("data.sequence_length", length, why, parts)


def _tensor(recipe: Recipe) -> Iterator[str]:
    tensor = recipe.parallel.tensor
    language = recipe.model.language  # the ViT and the projector are whole on every rank
    for key, value in (
        ("model.language.num_attention_heads", language.num_attention_heads),
        ("model.language.num_query_groups", language.num_query_groups),
        ("model.language.ffn_hidden_size", language.ffn_hidden_size),
        ("model.language.vocab_size", language.vocab_size),
    ):
        if value % tensor:
            way_out = f"or choose parallel.tensor={_nearest_divisor(value, tensor)}"
            yield f"{_not_multiple(key, value, 'parallel.tensor', tensor)}; {way_out}"


def _pipeline(recipe: Recipe) -> Iterator[str]:
    parallel, layers = recipe.parallel, recipe.model.language.num_layers
    stages, first, virtual = parallel.pipeline, parallel.first_stage_layers, parallel.virtual_pipeline
    for key, value in (("virtual_pipeline", virtual), ("first_stage_layers", first)):
        if value is not None and stages == 1:
            yield f"parallel.{key} is {value} with parallel.pipeline 1; set it to null, or raise parallel.pipeline"
    rest, ranks, counted = layers, stages, "model.language.num_layers"
    if first is not None and stages > 1:
        if first >= layers:
            yield f"parallel.first_stage_layers is {first}; it must be below model.language.num_layers {layers}"
        if virtual is not None and first % virtual:
            yield _not_multiple("parallel.first_stage_layers", first, "parallel.virtual_pipeline", virtual)
        rest, ranks, counted = layers - first, stages - 1, "model.language.num_layers less parallel.first_stage_layers"
    parts = ranks * (virtual or 1)
    if rest % parts:
        by = "pipeline stages" if virtual is None else "pipeline stages times virtual_pipeline"
        nearest = _nearest_multiple(rest, parts)
        yield f"{counted} is {rest}, not a multiple of the {parts} {by}; the nearest is {nearest}"


def _schedule(recipe: Recipe) -> Iterator[str]:
    optim, steps = recipe.optim, recipe.train.steps
    if optim.warmup_steps > steps:
        yield f"optim.warmup_steps is {optim.warmup_steps}; it must be at most train.steps {steps}"
    if optim.min_lr > optim.lr:
        yield f"optim.min_lr is {optim.min_lr}; it must be at most optim.lr {optim.lr}"
    if optim.min_lr > 0 and optim.schedule == Schedule.constant:
        yield f"optim.min_lr is {optim.min_lr} with optim.schedule constant, which never reaches it; set optim.min_lr=0"


def _freeze(recipe: Recipe) -> Iterator[str]:
    if set(recipe.train.freeze) == set(Part):
        yield "train.freeze lists vision, projector and language, so nothing is left to train; leave one out"


def _world(recipe: Recipe, world_size: int) -> Iterator[str]:
    parallel, batch = recipe.parallel, recipe.train.global_batch_size
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    sizes = f"tensor {parallel.tensor} * pipeline {parallel.pipeline} * context {parallel.context} = {model_ranks}"
    if world_size % model_ranks:
        yield (
            f"parallel: {sizes}, and the job has {world_size} {'process' if world_size == 1 else 'processes'}; "
            f"their number must be a multiple, for example --nproc {_nearest_multiple(world_size, model_ranks)}"
        )
        return
    data = world_size // model_ranks
    if batch % data:
        yield (
            f"{_not_multiple('train.global_batch_size', batch, 'data parallel size', data)} "
            f"({world_size} processes / {model_ranks})"
        )
        return
    microbatches = batch // data
    if parallel.virtual_pipeline is not None and microbatches % parallel.pipeline:
        yield (
            f"train.global_batch_size is {batch}, {microbatches} micro-batches a rank; parallel.virtual_pipeline needs "
            f"a multiple of parallel.pipeline {parallel.pipeline}; the nearest is "
            f"{_nearest_multiple(microbatches, parallel.pipeline) * data}"
        )


def _get(recipe: Recipe, key: str):
    value = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _not_multiple(key: str, value: int, what: str, parts: int) -> str:
    return f"{key} is {value}, not a multiple of {what} {parts}; the nearest is {_nearest_multiple(value, parts)}"


def _nearest_multiple(value: int, parts: int) -> int:
    return max(1, round(value / parts)) * parts


def _nearest_divisor(value: int, wanted: int) -> int:
    return min((d for d in range(1, value + 1) if value % d == 0), key=lambda d: abs(d - wanted))
