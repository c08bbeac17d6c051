"""Which parallel layouts a recipe can have: what ranks share must divide. Every refusal names the nearest layout."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, Optional

from nemo_bluelm.config.schema import ContextComm, Fp8Recipe, Part, Recipe

FP8_MULTIPLE = {Fp8Recipe.delayed: 16, Fp8Recipe.current: 16, Fp8Recipe.blockwise: 128}  # of both sides of a product
KEYS = (
    *("parallel.tensor", "parallel.sequence", "parallel.pipeline", "parallel.virtual_pipeline"),
    *("parallel.first_stage_layers", "parallel.context", "parallel.context_comm"),
    *("data.sequence_length", "train.micro_batch_size", "train.global_batch_size"),
)
_KEPT = 12  # of the options for one part of a layout, those that change least are combined with the other parts'


def alignment(recipe: Recipe) -> int:
    """Tokens to a multiple of which every segment of a pack is padded.

    Context parallelism cuts each segment into 2 * context chunks, a pair per rank.
    """
    context = recipe.parallel.context
    return 2 * context if context > 1 else 1


def layout_problem(recipe: Recipe, world_size: Optional[int]) -> Optional[str]:
    """In one line what is wrong with the layout and which one is nearest, as overrides; None where it can train.

    Args:
        recipe: its other keys are valid.
        world_size: number of ranks it will run on; None leaves out what depends on it.
    """
    problem = next(problems(recipe, world_size), None)
    if problem is None:
        return None
    changes = nearest_layout(recipe, world_size)
    if changes is None:
        return problem
    return f"{problem}; the nearest that fits: {' '.join(f'{key}={_text(value)}' for key, value in changes.items())}"


def problems(recipe: Recipe, world_size: Optional[int]) -> Iterator[str]:
    """What is wrong with the layout, most basic first, without a way out."""
    for check in (_tensor, _pipeline, _context, _rows, _fp8_shapes):
        yield from check(recipe)
    yield from _batch(recipe, world_size)


def _tensor(recipe: Recipe) -> Iterator[str]:
    parallel, language = recipe.parallel, recipe.model.language  # the ViT and the projector are whole on every rank
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"):
        value = getattr(language, name)
        if value % parallel.tensor:
            yield f"model.language.{name} is {value}, not a multiple of parallel.tensor {parallel.tensor}"
    if parallel.sequence and parallel.tensor == 1:
        yield "parallel.sequence is true with parallel.tensor 1; sequence parallelism cuts rows over tensor ranks"


def _pipeline(recipe: Recipe) -> Iterator[str]:
    parallel, layers = recipe.parallel, recipe.model.language.num_layers
    stages, first, virtual = parallel.pipeline, parallel.first_stage_layers, parallel.virtual_pipeline
    for key, value in (("virtual_pipeline", virtual), ("first_stage_layers", first)):
        if value is not None and stages == 1:
            yield f"parallel.{key} is {value} with parallel.pipeline 1, which has nothing to divide"
    rest, ranks, counted = layers, stages, "model.language.num_layers"
    if first is not None and stages > 1:
        if first >= layers:
            yield f"parallel.first_stage_layers is {first}; it must be below model.language.num_layers {layers}"
        if virtual is not None and first % virtual:
            yield f"parallel.first_stage_layers is {first}, not a multiple of parallel.virtual_pipeline {virtual}"
        rest, ranks, counted = layers - first, stages - 1, "model.language.num_layers less parallel.first_stage_layers"
    parts = ranks * (virtual or 1)
    if rest % parts:
        by = "pipeline stages" if virtual is None else "pipeline stages times virtual_pipeline"
        yield f"{counted} is {rest}, not a multiple of the {parts} {by}"


def _context(recipe: Recipe) -> Iterator[str]:
    parallel, groups = recipe.parallel, recipe.model.language.num_query_groups
    if parallel.context > 1 and parallel.context_comm == ContextComm.a2a:
        ranks = parallel.tensor * parallel.context
        if groups % ranks:
            yield (
                f"parallel.context_comm is a2a, which splits heads over {ranks} ranks (tensor * context), and "
                f"model.language.num_query_groups is {groups}"
            )


def _rows(recipe: Recipe) -> Iterator[str]:
    needed, why = _rows_needed(recipe)
    length = recipe.data.sequence_length
    if length % needed:
        yield f"data.sequence_length is {length}, not a multiple of {needed}, for {why}"


def _rows_needed(recipe: Recipe) -> tuple[int, str]:
    """What data.sequence_length must be a multiple of, and because of which keys."""
    parallel, fp8 = recipe.parallel, recipe.precision.fp8.recipe
    # A rank holds 1 / context of a micro-batch's rows, and sequence parallelism cuts those again.
    parts, why = parallel.context, ["2 * parallel.context"] * (parallel.context > 1)
    if parallel.sequence:
        parts *= parallel.tensor
        why.append("parallel.tensor")
    if fp8 is not None and Part.language in recipe.precision.fp8.parts:
        parts *= FP8_MULTIPLE[fp8]
        why.append(f"{FP8_MULTIPLE[fp8]} (FP8 {fp8.value})")
    packs = recipe.train.micro_batch_size
    return math.lcm(alignment(recipe), parts // math.gcd(parts, packs)), " * ".join(why)


def _fp8_shapes(recipe: Recipe) -> Iterator[str]:
    fp8, tensor, language = recipe.precision.fp8, recipe.parallel.tensor, recipe.model.language
    if fp8.recipe is None:
        return
    multiple = FP8_MULTIPLE[fp8.recipe]
    if Part.language in fp8.parts:
        for name, size, ranks in (
            ("hidden_size", language.hidden_size, 1),
            ("ffn_hidden_size", language.ffn_hidden_size, tensor),
            ("num_attention_heads * kv_channels", language.num_attention_heads * language.kv_channels, tensor),
            ("num_query_groups * kv_channels", language.num_query_groups * language.kv_channels, tensor),
        ):
            if size % (multiple * ranks):
                over = f" over parallel.tensor {ranks} ranks" if ranks > 1 else ""
                yield (
                    f"model.language.{name} is {size}{over}, not a multiple of {multiple} as FP8 {fp8.recipe.value} "
                    f"needs, the nearest is {_nearest_multiple(size, multiple * ranks)}; choose that or precision=bf16"
                )
    if Part.vision in fp8.parts:
        vision = recipe.model.vision
        for name in ("hidden_size", "ffn_hidden_size"):
            if (size := getattr(vision, name)) % multiple:
                yield (
                    f"model.vision.{name} is {size}, not a multiple of {multiple} as FP8 {fp8.recipe.value} needs, the "
                    f"nearest is {_nearest_multiple(size, multiple)}; choose that or leave vision out of "
                    "precision.fp8.parts"
                )


def _batch(recipe: Recipe, world_size: Optional[int]) -> Iterator[str]:
    parallel, batch, packs = recipe.parallel, recipe.train.global_batch_size, recipe.train.micro_batch_size
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world_size is None:
        if batch % packs:
            yield f"train.global_batch_size is {batch}, not a multiple of train.micro_batch_size {packs}"
        return
    if world_size % model_ranks:
        sizes = f"tensor {parallel.tensor} * pipeline {parallel.pipeline} * context {parallel.context} = {model_ranks}"
        yield (
            f"parallel: {sizes}, and the job has {world_size} {'process' if world_size == 1 else 'processes'}; "
            f"their number must be a multiple, for example --nproc {_nearest_multiple(world_size, model_ranks)}"
        )
        return
    data = world_size // model_ranks
    if batch % (data * packs):
        micro = f" * train.micro_batch_size {packs}" if packs > 1 else ""
        yield (
            f"train.global_batch_size is {batch}, not a multiple of the data parallel size {data}{micro} "
            f"({world_size} processes / {model_ranks})"
        )
        return
    microbatches = batch // (data * packs)
    if parallel.virtual_pipeline is not None and microbatches % parallel.pipeline:
        yield (
            f"train.global_batch_size is {batch}, {microbatches} micro-batches a rank; parallel.virtual_pipeline needs "
            f"a multiple of parallel.pipeline {parallel.pipeline}"
        )


def nearest_layout(recipe: Recipe, world_size: Optional[int]) -> Optional[dict[str, Any]]:
    """The values of ``KEYS`` that differ in the valid layout with the fewest and smallest changes; None if none is."""
    best: Optional[tuple[float, dict[str, Any]]] = None
    parts = [_cheapest(recipe, options) for options in (_tensors(recipe), _pipelines(recipe), _contexts(recipe))]
    for combination in product(*parts):
        changes = {key: value for part in combination for key, value in part.items()}
        cost = _cost(recipe, changes)
        if best is not None and cost >= best[0]:
            continue
        candidate = with_changes(recipe, changes)
        changes |= _sizes(candidate, world_size)
        cost = _cost(recipe, changes)
        if (best is None or cost < best[0]) and not any(problems(with_changes(recipe, changes), world_size)):
            best = cost, changes
    return best and {key: value for key, value in best[1].items() if value != _get(recipe, key)} or None


def with_changes(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """A copy of the recipe with other values for dotted keys of two words."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return replace(recipe, **{name: replace(getattr(recipe, name), **values) for name, values in sections.items()})


def _tensors(recipe: Recipe) -> Iterator[dict[str, Any]]:
    language = recipe.model.language
    sizes = (language.num_query_groups, language.num_attention_heads, language.ffn_hidden_size, language.vocab_size)
    shared = math.gcd(*sizes)
    for tensor in (t for t in range(1, language.num_query_groups + 1) if shared % t == 0):
        for sequence in (False, True) if tensor > 1 else (False,):
            yield {"parallel.tensor": tensor, "parallel.sequence": sequence}


def _pipelines(recipe: Recipe) -> Iterator[dict[str, Any]]:
    parallel, layers = recipe.parallel, recipe.model.language.num_layers
    for stages in range(1, layers + 1):
        for virtual in {None, parallel.virtual_pipeline, 2, 4} if stages > 1 else (None,):
            for first in (None, *range(1, layers)) if parallel.first_stage_layers and stages > 1 else (None,):
                changes = {
                    "parallel.pipeline": stages,
                    "parallel.virtual_pipeline": virtual,
                    "parallel.first_stage_layers": first,
                }
                if not any(_pipeline(with_changes(recipe, changes))):
                    yield changes


def _contexts(recipe: Recipe) -> Iterator[dict[str, Any]]:
    given = recipe.parallel.context
    for context in sorted({1, 2, 4, 8, 16, *range(max(1, given - 2), given + 1)}):
        for comm in {recipe.parallel.context_comm, ContextComm.all_gather}:
            yield {"parallel.context": context, "parallel.context_comm": comm}


def _sizes(recipe: Recipe, world_size: Optional[int]) -> dict[str, Any]:
    """Length and batch that go with the layout of ``recipe``."""
    parallel, packs = recipe.parallel, recipe.train.micro_batch_size
    needed = _rows_needed(recipe)[0]
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    ranks = 1 if world_size is None else max(1, world_size // model_ranks)
    batch = ranks * packs
    if parallel.virtual_pipeline is not None and world_size is not None:
        batch *= parallel.pipeline
    return {
        "data.sequence_length": _nearest_multiple(recipe.data.sequence_length, needed),
        "train.global_batch_size": _nearest_multiple(recipe.train.global_batch_size, batch),
    }


def _cheapest(recipe: Recipe, options: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that change least, and the one without parallelism, which asks least of the other parts."""
    ordered = sorted(options, key=lambda changes: _cost(recipe, changes))
    return [*ordered[:_KEPT], *(one for one in ordered[_KEPT:] if set(one.values()) <= {1, None, False, *ContextComm})]


def _cost(recipe: Recipe, changes: dict[str, Any]) -> float:
    """How far a layout is from the recipe's: a little for each key, and how often a number doubles."""
    cost = 0.0
    for key, value in changes.items():
        given = _get(recipe, key)
        if value != given:
            number = isinstance(value, int) and isinstance(given, int) and not isinstance(value, bool)
            cost += 0.5 + (abs(math.log2(value / given)) if number else 0.5)
    return cost


def _get(recipe: Recipe, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def _text(value: Any) -> str:
    """As an override writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(getattr(value, "value", value))


def _nearest_multiple(value: int, parts: int) -> int:
    return max(1, round(value / parts)) * parts
