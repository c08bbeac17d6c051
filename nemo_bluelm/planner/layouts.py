"""Layouts that fit N GPUs of a kind, the fastest first."""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from itertools import product
from typing import Any, Optional

from nemo_bluelm.config.checks import check_recipe
from nemo_bluelm.config.layout import distance, nearest_layout, problems, with_changes
from nemo_bluelm.config.schema import ContextComm, Part, Recipe, Recompute
from nemo_bluelm.errors import UserError
from nemo_bluelm.model.flops import Flops
from nemo_bluelm.planner.cost import Estimate, estimate, step_flops
from nemo_bluelm.planner.devices import GPUS_PER_NODE, Device
from nemo_bluelm.planner.memory import GIB, Memory, notable_stages, stage_memory, stages_memory
from nemo_bluelm.planner.teacher import distills, teacher_problems

WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)

# A rank with fewer tokens of a pack than this spends its time on launching kernels and on sending; nothing was measured
# below.
TOKENS_PER_RANK = 1024
# A batch is large enough when a GPU does this share of what it does with so many packs of its own.
ENOUGH, PACKS_PER_GPU = 0.9, 8

# What a proposal may set.
_PARALLEL = (
    *("tensor", "sequence", "pipeline", "virtual_pipeline", "first_stage_layers", "context", "context_comm"),
    "distributed_optimizer",
)
_POWERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Layout:
    """A recipe with a layout for ``world_size`` GPUs, and what it costs there.

    Attributes:
        recipe: it passes ``check_recipe``.
        tiles: image tiles that every pack is taken to hold.
    """

    recipe: Recipe
    world_size: int
    device: Device
    tiles: int

    @property
    def data_parallel(self) -> int:
        parallel = self.recipe.parallel
        return self.world_size // (parallel.tensor * parallel.pipeline * parallel.context)

    @cached_property
    def memory(self) -> list[Memory]:
        """Of every stage of the pipeline."""
        return stages_memory(self.recipe, self.data_parallel, self.tiles)

    @cached_property
    def estimate(self) -> Estimate:
        return estimate(self.recipe, self.world_size, self.device, self.tiles)

    @cached_property
    def needed(self) -> float:
        """GiB that a GPU of the fullest stage must have."""
        stages = notable_stages(self.recipe)
        return max(stage_memory(self.recipe, self.data_parallel, stage, self.tiles).needed for stage in stages) / GIB

    @property
    def fits(self) -> bool:
        return self.needed <= self.device.memory

    def overrides(self, recipe: Recipe) -> list[str]:
        """What turns ``recipe`` into this one, as ``key=value`` for the command line."""
        mine, theirs = _settings(self.recipe), _settings(recipe)
        return [f"{key}={_text(value)}" for key, value in mine.items() if value != theirs[key]]


def check_device(recipe: Recipe, device: Device) -> None:
    """
    Raises:
        UserError: the device can't do the recipe's precision.
    """
    fp8 = recipe.precision.fp8.recipe
    if fp8 is not None and fp8 not in device.fp8:
        raise UserError(f"precision.fp8.recipe is {fp8.value}, which {device.name} can't do; set precision=bf16")


def propose(recipe: Recipe, world_size: int, device: Device, tiles: int) -> list[Layout]:
    """All layouts that pass the checks and fit, the fastest first; of equals the one with fewer ranks in a model copy.

    Numbers of packs in a step and their length stay as they are: they change what is trained.

    Args:
        recipe: all but its layout passes ``check_recipe``.
        tiles: image tiles in every pack.
    """
    ways = _ways(recipe, tiles)
    found = (_fitting(split, ways) for split in _splits(recipe, world_size, device, tiles, ways[0]))
    return sorted((layout for layout in found if layout), key=_order)


def best(recipe: Recipe, world_size: int, device: Device, tiles: int) -> Optional[Layout]:
    """The first of :func:`propose`, without the others; None if nothing fits."""
    ways, found = _ways(recipe, tiles), None
    for split in sorted(_splits(recipe, world_size, device, tiles, ways[0]), key=_order):
        if found and _order(found) <= _order(split):  # what is computed again makes none of the rest faster
            break
        fitting = _fitting(split, ways)
        if fitting and (found is None or _order(fitting) < _order(found)):
            found = fitting
    return found


def fastest(recipe: Recipe, world_size: int, device: Device, tiles: int) -> Optional[Layout]:
    """The fastest layout that fits, with a larger batch where a GPU gets much more done with it; None if none fits.

    The global batch is doubled as often as it takes to be within ``ENOUGH`` of the MFU that ``PACKS_PER_GPU`` packs for
    each GPU would have, or for a layout to exist at all.
    """
    batch = recipe.train.global_batch_size
    most = max(0, math.ceil(math.log2(PACKS_PER_GPU * world_size / batch)))
    found: dict[int, Optional[Layout]] = {}

    def after(doublings: int) -> Optional[Layout]:
        if doublings not in found:
            found[doublings] = best(with_batch(recipe, batch << doublings), world_size, device, tiles)
        return found[doublings]

    if after(most) is None:  # an odd number of packs needs some doublings to be shared evenly
        return next(filter(None, map(after, range(most + 1, most + world_size.bit_length() + 1))), None)

    def is_enough(doublings: int) -> bool:
        layout = after(doublings)
        return layout is not None and layout.estimate.mfu >= ENOUGH * after(most).estimate.mfu

    if is_enough(0):
        return after(0)
    # A larger batch is never slower, so the first that is enough can be bisected for.
    return after(bisect_left(range(most + 1), True, lo=1, key=is_enough))


def nearest(recipe: Recipe, world_size: int, device: Device, tiles: int) -> Optional[Layout]:
    """The layout that changes least of ``recipe`` and fits; None if none does.

    That is the one that ``check_recipe`` names if it has room, else by the same measure the nearest of those proposed,
    more packs in a step among the changes.
    """
    changes = nearest_layout(recipe, world_size, lambda candidate: _is_valid(candidate, world_size))
    if changes:
        valid = Layout(with_changes(recipe, changes), world_size, device, tiles)
        if valid.fits:
            return valid
    found, least = None, math.inf
    for doublings in range(world_size.bit_length() + 1):
        if least <= doublings:  # so much the batch alone would change
            break
        more = with_batch(recipe, recipe.train.global_batch_size << doublings)
        for layout in propose(more, world_size, device, tiles):
            if (far := _distance(recipe, layout)) < least:
                found, least = layout, far
    return found


def scaling(recipe: Recipe, base: Layout) -> Iterator[tuple[int, Optional[Layout], Optional[Layout]]]:
    """For 8 to 1024 GPUs the fastest layout with the recipe's batch, or what ``fastest`` makes of it, and with one that
    grows with the GPUs.

    The second keeps the packs a GPU that ``base`` has; None for fewer GPUs than those.
    """
    for gpus in WORLDS:
        same, grown = fastest(recipe, gpus, base.device, base.tiles), None
        if gpus >= base.world_size and gpus % base.world_size == 0:
            batch = base.recipe.train.global_batch_size * gpus // base.world_size
            is_same = same and same.recipe.train.global_batch_size == batch
            grown = same if is_same else best(with_batch(recipe, batch), gpus, base.device, base.tiles)
        yield gpus, same, grown


def _is_valid(recipe: Recipe, world_size: int) -> bool:
    if any(problems(recipe, world_size)):
        return False
    try:
        check_recipe(recipe, world_size)
    except UserError:
        return False
    return True


def _order(layout: Layout) -> tuple[float, int]:
    return round(layout.estimate.seconds, 4), layout.world_size // layout.data_parallel


def _distance(recipe: Recipe, layout: Layout) -> float:
    """``config.layout.distance``, and one for each setting of recomputation."""
    mine, theirs = _settings(layout.recipe), _settings(recipe)
    changes = {key: value for key, value in mine.items() if value != theirs[key]}
    known = {key: value for key, value in changes.items() if key.count(".") == 1}
    return distance(recipe, known) + len(changes) - len(known)


def _fitting(layout: Layout, ways: list[dict[str, Any]]) -> Optional[Layout]:
    """``layout``, which has the first of ``ways``, or with the first of the others that makes it fit."""
    if layout.fits:
        return layout
    others = [replace(layout, recipe=with_settings(layout.recipe, way)) for way in ways[1:]]
    if not (others and others[-1].fits):  # the last needs least
        return None
    return next(other for other in others if other.fits)


def _splits(
    recipe: Recipe, world_size: int, device: Device, tiles: int, recomputation: dict[str, Any]
) -> Iterator[Layout]:
    """Valid layouts, whether they fit or not."""
    layers, batch = recipe.model.language.num_layers, recipe.train.global_batch_size
    sizes = [n for n in _POWERS if world_size % n == 0]
    flops = step_flops(recipe, tiles)
    contexts = [n for n in sizes if n == 1 or recipe.data.sequence_length >= n * TOKENS_PER_RANK]
    comms = tuple(dict.fromkeys((recipe.parallel.context_comm, ContextComm.all_gather)))
    for tensor, pipeline, context, packs in product(
        [n for n in sizes if n <= GPUS_PER_NODE],  # tensor parallelism talks too much to leave a node
        [1] if distills(recipe) else [n for n in sizes if n <= layers],  # teacher and student meet on one rank
        contexts[:1] if recipe.train.cuda_graphs else contexts,  # a graph can't see where documents are cut
        (1, 2, 4, 8),
    ):
        copies, rest = divmod(world_size, tensor * pipeline * context)
        if rest or batch % (copies * packs):
            continue
        if context > 1 and packs > 1:  # the same rows a rank as half of both, and more to send
            continue
        for virtual, comm in product((None, 2, 4) if pipeline > 1 else (None,), comms if context > 1 else comms[:1]):
            uneven = _first_stage(layers, flops, pipeline, virtual or 1)
            for first in (None, uneven) if uneven else (None,):
                settings = {
                    "parallel.tensor": tensor,
                    "parallel.sequence": tensor > 1,
                    "parallel.pipeline": pipeline,
                    "parallel.virtual_pipeline": virtual,
                    "parallel.context": context,
                    "parallel.context_comm": comm,
                    "parallel.first_stage_layers": first,
                    "parallel.distributed_optimizer": True,
                    "train.micro_batch_size": packs,
                }
                split = with_settings(recipe, settings | recomputation)
                if not any(problems(split, world_size)) and not any(teacher_problems(split)):
                    yield Layout(split, world_size, device, tiles)


def _ways(recipe: Recipe, tiles: int) -> list[dict[str, Any]]:
    """Settings for what is computed again, those that cost least first."""
    no_vision = tiles == 0 or Part.vision in recipe.train.freeze
    ways = [
        (language, vision)
        for language, vision in product((Recompute.none, Recompute.mlp, Recompute.full), repeat=2)
        if not (no_vision and vision != Recompute.none)
        and not (recipe.train.cuda_graphs and language != Recompute.none)  # a graph can't compute again
    ]
    ways.sort(key=lambda way: _recompute_cost(recipe, *way, tiles))
    return [
        {
            "train.recompute.language": language,
            "train.recompute.vision": vision,
            "train.recompute.language_layers": None,
        }
        for language, vision in ways
    ]


def _recompute_cost(recipe: Recipe, language: Recompute, vision: Recompute, tiles: int) -> float:
    """FLOPs that are done twice, roughly: an MLP is three quarters of a layer."""
    flops, share = step_flops(recipe, tiles), {Recompute.none: 0.0, Recompute.mlp: 0.75, Recompute.full: 1.0}
    return (flops.linear + flops.attention) * share[language] + flops.vision * share[vision]


def _first_stage(layers: int, flops: Flops, pipeline: int, virtual: int) -> Optional[int]:
    """Decoder layers that leave the first stage, which has the ViT, as much work as the others; None if none do."""
    layer = (flops.linear + flops.attention) / layers
    if pipeline == 1 or not layer:
        return None
    wanted = (layers * layer - (pipeline - 1) * flops.vision) / pipeline / layer
    valid = [n for n in range(virtual, layers // pipeline, virtual) if (layers - n) % ((pipeline - 1) * virtual) == 0]
    return min(valid, key=lambda n: abs(n - wanted), default=None)


def with_batch(recipe: Recipe, batch: int) -> Recipe:
    return with_settings(recipe, {"train.global_batch_size": batch})


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """A copy with dotted ``parallel`` and ``train`` keys changed."""
    parallel, train, recompute = {}, {}, {}
    for key, value in settings.items():
        *blocks, name = key.split(".")
        {("parallel",): parallel, ("train",): train, ("train", "recompute"): recompute}[tuple(blocks)][name] = value
    if recompute:
        train["recompute"] = replace(recipe.train.recompute, **recompute)
    return replace(
        recipe,
        parallel=replace(recipe.parallel, **parallel) if parallel else recipe.parallel,
        train=replace(recipe.train, **train),
    )


def _settings(recipe: Recipe) -> dict[str, Any]:
    train = recipe.train
    return {
        "data.sequence_length": recipe.data.sequence_length,
        **{f"parallel.{name}": getattr(recipe.parallel, name) for name in _PARALLEL},
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        **{f"train.recompute.{key}": value for key, value in vars(train.recompute).items()},
    }


def _text(value: Any) -> str:
    if isinstance(value, Enum):
        return value.value
    return "null" if value is None else str(value).lower()
