"""Which parallel layouts a recipe can have: what ranks share must divide. Every refusal names the nearest layout."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce
from itertools import product
from typing import Any, Optional

from nemo_bluelm.config.schema import ContextComm, Fp8Config, Fp8Recipe, Part, Recipe

FP8_MULTIPLE = {Fp8Recipe.delayed: 16, Fp8Recipe.current: 16, Fp8Recipe.blockwise: 128}  # of both sides of a product
KEYS = (
    *("parallel.tensor", "parallel.sequence", "parallel.pipeline", "parallel.virtual_pipeline"),
    *("parallel.first_stage_layers", "parallel.context", "parallel.context_comm"),
    *("data.sequence_length", "train.micro_batch_size", "train.global_batch_size"),
)
Accepts = Callable[[Recipe], bool]  # whether a recipe passes what is checked elsewhere
_SPLITS = ("tensor", "pipeline", "context")  # their product is the ranks of one copy of the model
_KEPT = 12  # of the options for one part of a layout, those that change least are combined with the other parts'


def alignment(recipe: Recipe) -> int:
    """Tokens to a multiple of which every segment of a pack is padded.

    Context parallelism cuts each segment into 2 * context chunks, a pair per rank.
    """
    context = recipe.parallel.context
    return 2 * context if context > 1 else 1


def layout_problem(recipe: Recipe, world_size: Optional[int], accepts: Accepts) -> Optional[str]:
    """In one line what is wrong with the layout and which one is nearest, as overrides; None where it can train.

    Args:
        recipe: ``accepts`` it.
        world_size: number of ranks it will run on; None leaves out what depends on it.
        accepts: whether every other check passes; what is suggested must pass those too.
    """
    problem = next(problems(recipe, world_size), None)
    if problem is None:
        return None
    changes = nearest_layout(recipe, world_size, accepts)
    if changes is not None:
        return f"{problem}; the nearest that fits: {_overrides(changes)}"
    for words, less in _less_fp8(recipe):
        with_less = with_changes(recipe, less)
        changes = nearest_layout(with_less, world_size, accepts)
        if changes is None:
            continue
        mended = _mended(recipe, changes, world_size, accepts)
        model = f"; FP8 {recipe.precision.fp8.recipe.value} fits with {_overrides(mended)}" if mended else ""
        return f"{problem}{model}; {words} the nearest that fits: {_overrides(less | changes)}"
    return problem


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
    return _stages(layers, parallel.pipeline, parallel.virtual_pipeline, parallel.first_stage_layers)


def _stages(layers: int, stages: int, virtual: Optional[int], first: Optional[int]) -> Iterator[str]:
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
    for told, _ in _fp8_misfits(recipe):
        yield told


def _fp8_misfits(recipe: Recipe) -> Iterator[tuple[str, dict[str, int]]]:
    """Each size of the model that FP8 can't take, in words, and the key to change with the nearest value that fits."""
    fp8, tensor = recipe.precision.fp8, recipe.parallel.tensor
    if fp8.recipe is None:
        return
    multiple = FP8_MULTIPLE[fp8.recipe]
    sizes = {}  # for each key: what must be a multiple, its size, the ranks that split it, the step of the key
    if Part.language in fp8.parts:
        language, split = recipe.model.language, multiple * tensor
        groups, channels = language.num_query_groups, language.kv_channels
        both = f"model.language.num_query_groups {groups} * model.language.kv_channels {channels}"
        pairs = math.lcm(2, split // math.gcd(split, groups))  # RoPE turns pairs of channels
        sizes["model.language.hidden_size"] = "model.language.hidden_size", language.hidden_size, 1, multiple
        ffn = language.ffn_hidden_size
        sizes["model.language.ffn_hidden_size"] = "model.language.ffn_hidden_size", ffn, tensor, split
        # Groups divide the attention heads, so heads * kv_channels fits where this does.
        sizes["model.language.kv_channels"] = both, groups * channels, tensor, pairs
    if Part.vision in fp8.parts:
        vision = recipe.model.vision
        heads = math.lcm(multiple, vision.num_attention_heads)
        sizes["model.vision.hidden_size"] = "model.vision.hidden_size", vision.hidden_size, 1, heads
        sizes["model.vision.ffn_hidden_size"] = "model.vision.ffn_hidden_size", vision.ffn_hidden_size, 1, multiple
    for key, (called, size, ranks, step) in sizes.items():
        if size % (multiple * ranks):
            over = f" over parallel.tensor {ranks} ranks" if ranks > 1 else ""
            told = f"{called} is {size}{over}, not a multiple of {multiple} as FP8 {fp8.recipe.value} needs"
            yield told, {key: _nearest_multiple(_get(recipe, key), step)}


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


def nearest_layout(recipe: Recipe, world_size: Optional[int], accepts: Accepts) -> Optional[dict[str, Any]]:
    """The values of ``KEYS`` that differ in the valid layout with the fewest and smallest changes; None if none is."""
    best: Optional[tuple[float, dict[str, Any]]] = None
    parts = [_cheapest(recipe, options) for options in (_tensors(recipe), _pipelines(recipe), _contexts(recipe))]
    combinations = sorted(product(*parts), key=lambda combination: sum(cost for cost, _ in combination))
    for combination in combinations:
        cost = sum(cost for cost, _ in combination)
        if best is not None and cost >= best[0]:
            break
        changes = {key: value for _, part in combination for key, value in part.items()}
        if world_size is not None and world_size % math.prod(changes[f"parallel.{name}"] for name in _SPLITS):
            continue
        candidate = with_changes(recipe, changes)
        if any(_context(candidate)):
            continue
        for sizes in _sizes(candidate, world_size):
            total = cost + distance(recipe, sizes)
            if best is not None and total >= best[0]:
                continue
            sized = with_changes(candidate, sizes)
            if accepts(sized) and not any(problems(sized, world_size)):
                best = total, changes | sizes
    return None if best is None else {key: value for key, value in best[1].items() if value != _get(recipe, key)}


def _less_fp8(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    """What takes FP8 out where no layout fits with it: in words, and as changes."""
    fp8 = recipe.precision.fp8
    if fp8.recipe is None:
        return
    if Part.vision in fp8.parts and Part.language in fp8.parts:
        yield "with the ViT in BF16", {"precision.fp8.parts": [Part.language]}
    # Not precision=bf16: a block loses to keys that the recipe or the command line set.
    unset = vars(Fp8Config()).items()
    yield "without FP8", {f"precision.fp8.{key}": value for key, value in unset if getattr(fp8, key) != value}


def _mended(
    recipe: Recipe, changes: dict[str, Any], world_size: Optional[int], accepts: Accepts
) -> Optional[dict[str, Any]]:
    """``changes``, a layout that fits without FP8, and the sizes of the model with which FP8 fits."""
    laid_out = with_changes(recipe, changes)
    shapes = {key: value for _, change in _fp8_misfits(laid_out) for key, value in change.items()}
    further = nearest_layout(with_changes(laid_out, shapes), world_size, accepts) if shapes else None
    return None if further is None else shapes | changes | further


def with_changes(node: Any, changes: dict[str, Any]) -> Any:
    """A copy of a recipe, or a part of one, with other values for dotted keys."""
    values, sections = {}, {}
    for key, value in changes.items():
        name, _, rest = key.partition(".")
        if rest:
            sections.setdefault(name, {})[rest] = value
        else:
            values[name] = value
    return replace(node, **values, **{name: with_changes(getattr(node, name), sub) for name, sub in sections.items()})


def _tensors(recipe: Recipe) -> Iterator[dict[str, Any]]:
    language = recipe.model.language
    sizes = (language.num_query_groups, language.num_attention_heads, language.ffn_hidden_size, language.vocab_size)
    shared = math.gcd(*sizes)
    for tensor in (t for t in range(1, language.num_query_groups + 1) if shared % t == 0):
        for sequence in (False, True) if tensor > 1 else (False,):
            changes = {"parallel.tensor": tensor, "parallel.sequence": sequence}
            if not any(_fp8_shapes(with_changes(recipe, changes))):
                yield changes


def _pipelines(recipe: Recipe) -> Iterator[dict[str, Any]]:
    parallel, layers = recipe.parallel, recipe.model.language.num_layers
    for stages in range(1, layers + 1):
        for virtual in dict.fromkeys((None, parallel.virtual_pipeline, 2, 4)) if stages > 1 else (None,):
            for first in (None, *range(1, layers)) if parallel.first_stage_layers and stages > 1 else (None,):
                if not any(_stages(layers, stages, virtual, first)):
                    yield {
                        "parallel.pipeline": stages,
                        "parallel.virtual_pipeline": virtual,
                        "parallel.first_stage_layers": first,
                    }


def _contexts(recipe: Recipe) -> Iterator[dict[str, Any]]:
    given = recipe.parallel.context
    for context in sorted({1, 2, 4, 8, 16, *range(max(1, given - 2), given + 1)}):
        for comm in dict.fromkeys((recipe.parallel.context_comm, ContextComm.all_gather)):
            yield {"parallel.context": context, "parallel.context_comm": comm}


def _sizes(recipe: Recipe, world_size: Optional[int]) -> Iterator[dict[str, Any]]:
    """Lengths and batches that go with the layout of ``recipe``: the multiples on both sides, within RoPE's reach."""
    parallel, yarn = recipe.parallel, recipe.model.language.yarn
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    batch = recipe.train.micro_batch_size * (1 if world_size is None else world_size // model_ranks)
    if parallel.virtual_pipeline is not None and world_size is not None:
        batch *= parallel.pipeline
    for length in _multiples(recipe.data.sequence_length, _rows_needed(recipe)[0]):
        if length <= yarn.original_max_position_embeddings * yarn.factor:
            for packs in _multiples(recipe.train.global_batch_size, batch):
                yield {"data.sequence_length": length, "train.global_batch_size": packs}


def _cheapest(recipe: Recipe, options: Iterator[dict[str, Any]]) -> list[tuple[float, dict[str, Any]]]:
    """Those that change least, each after its cost, and the one without parallelism, which asks least of the others."""
    ordered = sorted(((distance(recipe, changes), changes) for changes in options), key=lambda option: option[0])
    plain = {1, None, False, *ContextComm}
    return [*ordered[:_KEPT], *(one for one in ordered[_KEPT:] if set(one[1].values()) <= plain)]


def distance(recipe: Recipe, changes: dict[str, Any]) -> float:
    """How far a layout is from the recipe's: a little for each key, and how often a number doubles."""
    cost = 0.0
    for key, value in changes.items():
        given = _get(recipe, key)
        if value != given:
            number = isinstance(value, int) and isinstance(given, int) and not isinstance(value, bool)
            cost += 0.5 + (abs(math.log2(value / given)) if number else 0.5)
    return cost


def _get(recipe: Recipe, key: str) -> Any:
    return reduce(getattr, key.split("."), recipe)


def _overrides(changes: dict[str, Any]) -> str:
    """As they are pasted on the command line."""
    return " ".join(f"{key}={_text(value)}" for key, value in changes.items())


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return str(getattr(value, "value", value))


def _nearest_multiple(value: int, parts: int) -> int:
    return max(1, round(value / parts)) * parts


def _multiples(value: int, parts: int) -> set[int]:
    """The nearest multiples at most and at least ``value``."""
    return {max(1, value // parts) * parts, -(-value // parts) * parts}
