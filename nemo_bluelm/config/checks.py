"""Checks across keys: what a type can't say. Each failure is one line with the key, the value and the way out."""

import math
from importlib.util import find_spec
from typing import Iterator

from nemo_bluelm.config.distill_checks import distill_problems
from nemo_bluelm.config.grpo import Objective, grpo_problems
from nemo_bluelm.config.layout import alignment, layout_problem
from nemo_bluelm.config.optim_checks import optim_problems
from nemo_bluelm.config.reward_model import reward_model_problems
from nemo_bluelm.config.schema import (
    ContextComm,
    DecodeBackend,
    DecodeDevice,
    Dtype,
    Fp8Config,
    Fp8Recipe,
    Part,
    Recipe,
    Recompute,
    geometry_of,
)
from nemo_bluelm.errors import UserError

__all__ = ["alignment", "check_all_but_layout", "check_machine", "check_recipe"]


def check_recipe(recipe: Recipe, world_size: int | None) -> None:
    """Refuse a recipe that cannot train.

    Args:
        recipe: a complete recipe.
        world_size: number of ranks it will run on; None leaves out what depends on it.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_all_but_layout(recipe)
    if message := layout_problem(recipe, world_size, lambda candidate: not any(_all_but_layout(candidate))):
        raise UserError(message)


def check_all_but_layout(recipe: Recipe) -> None:
    """Refuse a recipe that no layout makes right; ``config.layout.problems`` needs one that passes.

    Raises:
        UserError: the first thing that is wrong.
    """
    for message in _all_but_layout(recipe):
        raise UserError(message)


def check_machine(recipe: Recipe) -> None:
    """Refuse a recipe that needs what this machine lacks; torch is imported only when the recipe asks for it.

    Raises:
        UserError: a GPU-only setting without a CUDA device, a device without FP8, no Transformer Engine.
    """
    parallel, fp8 = recipe.parallel, recipe.precision.fp8.recipe
    ring = parallel.context > 1 and parallel.context_comm == ContextComm.p2p
    wants_gpu = {
        "data.decode.device is gpu": (recipe.data.decode.device == DecodeDevice.gpu, "cpu"),
        "train.cuda_graphs is true": (recipe.train.cuda_graphs, "false"),
        f"train.straggler_report is {recipe.train.straggler_report:g}": (bool(recipe.train.straggler_report), "0"),
        "parallel.context_comm is p2p": (ring, "all_gather"),
        f"precision.fp8.recipe is {fp8 and fp8.value}": (fp8 is not None, "null"),
    }
    for what, (wanted, instead) in wants_gpu.items():
        if wanted:
            import torch

            if not torch.cuda.is_available():
                key = what.split()[0]
                raise UserError(f"{what} and this machine has no CUDA device; set {key}={instead}")
    wants_engine = {
        "parallel.context_comm is p2p": ring,
        f"precision.fp8.recipe is {fp8 and fp8.value}": fp8 is not None,
    }
    for what, wanted in wants_engine.items():
        if wanted and find_spec("transformer_engine") is None:
            instead = wants_gpu[what][1]
            raise UserError(
                f"{what}, which needs Transformer Engine; pip install 'nemo-bluelm[gpu]', or set "
                f"{what.split()[0]}={instead}"
            )
    if fp8 is not None:
        needed, found = ((9, 0) if fp8 == Fp8Recipe.blockwise else (8, 9)), torch.cuda.get_device_capability()
        if found < needed:
            raise UserError(
                f"precision.fp8.recipe is {fp8.value}, which needs compute capability {needed[0]}.{needed[1]}, and "
                f"{torch.cuda.get_device_name()} has {found[0]}.{found[1]}; set precision.fp8.recipe=null"
            )


def _all_but_layout(recipe: Recipe) -> Iterator[str]:
    for check in (
        _ranges,
        _names,
        _mixture,
        _vision,
        _language,
        _context,
        _precision,
        _recompute,
        _cuda_graphs,
        optim_problems,
        _lora,
        distill_problems,
        _objective,
    ):
        yield from check(recipe)


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
    "data.max_documents": (1, True),
    "data.max_bad_fraction": (0, True),
    "data.decode.threads": (0, True),
    "data.decode.prefetch": (0, True),
    "parallel.tensor": (1, True),
    "parallel.pipeline": (1, True),
    "parallel.virtual_pipeline": (2, True),
    "parallel.first_stage_layers": (1, True),
    "parallel.context": (1, True),
    "precision.fp8.bf16_first_layers": (0, True),
    "precision.fp8.bf16_last_layers": (0, True),
    "optim.lr": (0, False),
    "optim.min_lr": (0, True),
    "optim.warmup_steps": (0, True),
    "optim.warmup_tokens": (1, True),
    "optim.decay_steps": (1, True),
    "optim.second_lr": (0, False),
    **{f"optim.parts.{part.value}.lr": (0, False) for part in Part},
    **{f"optim.parts.{part.value}.weight_decay": (0, True) for part in Part},
    "optim.vision_layer_decay": (0, False),
    "optim.weight_decay": (0, True),
    "optim.beta1": (0, True),
    "optim.beta2": (0, True),
    "optim.eps": (0, False),
    "optim.clip_grad": (0, True),
    "train.steps": (1, True),
    "train.global_batch_size": (1, True),
    "train.micro_batch_size": (1, True),
    "train.min_text_share": (0, True),
    "train.recompute.language_layers": (1, True),
    "train.lora.rank": (0, True),
    "train.lora.alpha": (0, False),
    "train.lora.dropout": (0, True),
    "train.save_every": (1, True),
    "train.log_every": (1, True),
    "train.keep_every": (0, True),
    "train.skip_bad_steps": (0, True),
    "train.spike_factor": (0, True),
    "train.hang_timeout": (0, True),
    "train.straggler_report": (0, True),
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
    for key in ("data.max_bad_fraction", "train.min_text_share"):
        if (_get(recipe, key) or 0) > 1:
            yield f"{key} is {_get(recipe, key)}; it must be at most 1"
    for key in ("optim.beta1", "optim.beta2"):
        if _get(recipe, key) >= 1:
            yield f"{key} is {_get(recipe, key)}; it must be below 1"
    keep = recipe.train.keep_checkpoints
    if keep == 0 or keep < -1:
        yield f"train.keep_checkpoints is {keep}; it must be 1 or more, or -1 to keep all"
    spike = recipe.train.spike_factor
    if spike and spike <= 1:
        yield f"train.spike_factor is {spike}; it must be above 1, or 0 for none"
    if spike and not recipe.train.skip_bad_steps:
        yield f"train.spike_factor is {spike}, but train.skip_bad_steps is 0: no step is skipped; set it to 1 or more"


def _names(recipe: Recipe) -> Iterator[str]:
    if not recipe.name.strip() or "/" in recipe.name:
        yield f"name is {recipe.name!r}; it must be a word without '/', it names the run's folder"
    for key in ("run_dir", "data.root", "data.tokenizer", "data.index"):
        if not _get(recipe, key).strip():
            yield f"{key} is empty; it must be a path"
    for key in ("init_from", "init_vision_from"):
        folder = getattr(recipe, key)
        if folder is not None and not folder.strip():
            yield f"{key} is empty; it must be a run or checkpoint folder, or null"


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


def _objective(recipe: Recipe) -> Iterator[str]:
    if recipe.objective == Objective.grpo:
        yield from grpo_problems(recipe)
        if recipe.distill.teacher is not None or recipe.distill.logits is not None:
            yield "distill is set; with objective grpo set distill.teacher=null and distill.logits=null"
    elif recipe.objective == Objective.reward_model:
        yield from reward_model_problems(recipe)
    elif recipe.environments:
        yield "environments is set, but objective is next_token; set objective=grpo, or leave environments out"


def _lora(recipe: Recipe) -> Iterator[str]:
    lora = recipe.train.lora
    if not lora.rank:
        return
    if Part.language in recipe.train.freeze:
        yield (
            f"train.lora.rank is {lora.rank} with language in train.freeze, which would freeze the adapters too; leave "
            "language out of train.freeze, its own weights are frozen then, or set train.lora.rank=0"
        )
    if not lora.modules:
        yield "train.lora.modules is empty; it must list linear layers, for example [linear_qkv, linear_proj]"
    if lora.dropout >= 1:
        yield f"train.lora.dropout is {lora.dropout}; it must be below 1"


def _precision(recipe: Recipe) -> Iterator[str]:
    fp8, layers = recipe.precision.fp8, recipe.model.language.num_layers
    bf16_layers = {"bf16_first_layers": fp8.bf16_first_layers, "bf16_last_layers": fp8.bf16_last_layers}
    if fp8.recipe is None:
        for name, value in bf16_layers.items():
            if value:
                yield f"precision.fp8.{name} is {value} without precision.fp8.recipe; set it to 0, or choose a recipe"
        if fp8.parts != Fp8Config().parts:
            parts = ",".join(part.value for part in fp8.parts)
            yield f"precision.fp8.parts is [{parts}] without precision.fp8.recipe; leave it out, or choose a recipe"
        return
    dtype = recipe.precision.dtype
    if dtype != Dtype.bf16:
        yield f"precision.fp8.recipe is {fp8.recipe.value} with precision.dtype {dtype.value}; set precision.dtype=bf16"
    if not fp8.parts:
        yield "precision.fp8.parts is empty; it must list language or vision, or set precision.fp8.recipe=null"
    if Part.projector in fp8.parts:
        yield "precision.fp8.parts lists projector, which stays in BF16; leave it out"
    if Part.vision in fp8.parts and fp8.recipe != Fp8Recipe.current:
        # Blocks of 128 don't divide the ViT's rows, and delayed scaling waits for ranks whose micro-batch has no tiles.
        yield (
            f"precision.fp8.parts lists vision with precision.fp8.recipe {fp8.recipe.value}; leave it out, or set "
            "precision.fp8.recipe=current"
        )
    for name, value in bf16_layers.items():
        if value and fp8.recipe == Fp8Recipe.delayed:
            yield (
                f"precision.fp8.{name} is {value} with precision.fp8.recipe delayed, which has no BF16 layers; set it "
                "to 0, or precision.fp8.recipe=current"
            )
        if value and Part.language not in fp8.parts:
            yield f"precision.fp8.{name} is {value} without language in precision.fp8.parts; set it to 0"
    if sum(bf16_layers.values()) >= layers:
        yield (
            f"precision.fp8.bf16_first_layers {fp8.bf16_first_layers} and bf16_last_layers {fp8.bf16_last_layers} "
            f"leave none of model.language.num_layers {layers} in FP8; lower them, or leave language out of "
            "precision.fp8.parts"
        )


def _recompute(recipe: Recipe) -> Iterator[str]:
    recompute, layers = recipe.train.recompute, recipe.model.language.num_layers
    count, language = recompute.language_layers, recompute.language.value
    if count is not None and recompute.language != Recompute.full:
        yield (
            f"train.recompute.language_layers is {count} with train.recompute.language {language}; only full counts "
            "layers: set train.recompute.language=full, or train.recompute.language_layers=null"
        )
    if count is not None and count > layers:
        yield f"train.recompute.language_layers is {count}; it must be at most model.language.num_layers {layers}"
    if recompute.vision != Recompute.none and Part.vision in recipe.train.freeze:
        yield (
            f"train.recompute.vision is {recompute.vision.value}, but train.freeze lists vision, of which nothing is "
            "kept; set train.recompute.vision=none, or leave vision out"
        )


def _cuda_graphs(recipe: Recipe) -> Iterator[str]:
    language, context = recipe.train.recompute.language, recipe.parallel.context
    if not recipe.train.cuda_graphs:
        return
    if language != Recompute.none:
        yield (
            f"train.cuda_graphs is true with train.recompute.language {language.value}; a graph can't compute again, "
            "set train.recompute.language=none or train.cuda_graphs=false"
        )
    if context > 1:  # where a pack's documents lie decides which rows a rank has, and changes from pack to pack
        yield (
            f"train.cuda_graphs is true with parallel.context {context}; a graph can't see where documents are cut, "
            "set parallel.context=1 or train.cuda_graphs=false"
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
