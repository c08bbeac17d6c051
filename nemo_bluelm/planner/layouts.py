"""Layouts that fit N GPUs of a kind, the fastest first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from itertools import product
from typing import Any, Optional

from nemo_bluelm.config.layout import problems
from nemo_bluelm.config.schema import ContextComm, Part, Recipe, Recompute
from nemo_bluelm.errors import UserError
from nemo_bluelm.planner.cost import Estimate, estimate, step_flops
from nemo_bluelm.planner.devices import GPUS_PER_NODE, Device
from nemo_bluelm.planner.memory import GIB, Memory, notable_stages, stage_memory, stages_memory

WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)

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
    fitting = _candidates(recipe, world_size, device, tiles)
    return sorted(fitting, key=lambda layout: (round(layout.estimate.seconds, 4), world_size // layout.data_parallel))


def nearest(recipe: Recipe, proposed: list[Layout]) -> Optional[Layout]:
    """Of proposed layouts the one that changes fewest keys of ``recipe``; the fastest of equals."""
    return min(proposed, key=lambda layout: len(layout.overrides(recipe)), default=None)


def fastest(recipe: Recipe, world_size: int, device: Device, tiles: int) -> Optional[Layout]:
    """The fastest layout that fits; None if there is none.

    Where the global batch has too few packs for that many GPUs, it is doubled until it has enough.
    """
    for doublings in range(world_size.bit_length() + 1):
        batch = recipe.train.global_batch_size << doublings
        if proposed := propose(with_settings(recipe, {"train.global_batch_size": batch}), world_size, device, tiles):
            return proposed[0]
    return None


def scaling(
    recipe: Recipe, world_size: int, device: Device, tiles: int
) -> Iterator[tuple[int, Optional[Layout], Optional[Layout]]]:
    """For 8 to 1024 GPUs the fastest layout with the recipe's global batch, and with one that grows with them.

    The second keeps the packs a GPU that ``world_size`` GPUs have; None for fewer GPUs than those.
    """
    for gpus in WORLDS:
        grown = None
        if gpus >= world_size and gpus % world_size == 0:
            batch = recipe.train.global_batch_size * gpus // world_size
            grown = fastest(with_settings(recipe, {"train.global_batch_size": batch}), gpus, device, tiles)
        yield gpus, fastest(recipe, gpus, device, tiles), grown


def _candidates(recipe: Recipe, world_size: int, device: Device, tiles: int) -> Iterator[Layout]:
    """Valid layouts that fit, each with the least recomputation."""
    layers, ways = recipe.model.language.num_layers, _ways(recipe, tiles)
    sizes = [n for n in _POWERS if world_size % n == 0]
    for tensor, pipeline, context, virtual, balanced, packs in product(
        [n for n in sizes if n <= GPUS_PER_NODE],  # tensor parallelism talks too much to leave a node
        [n for n in sizes if n <= layers],
        sizes,
        (None, 2, 4),
        (False, True),
        (1, 2, 4, 8),
    ):
        copies, rest = divmod(world_size, tensor * pipeline * context)
        if rest or recipe.train.global_batch_size % (copies * packs) or (pipeline == 1 and (virtual or balanced)):
            continue
        if context > 1 and packs > 1:  # the same rows a rank as half of both, and more to send
            continue
        settings = {
            "parallel.tensor": tensor,
            "parallel.sequence": tensor > 1,
            "parallel.pipeline": pipeline,
            "parallel.virtual_pipeline": virtual,
            "parallel.context": context,
            "parallel.first_stage_layers": _first_stage(recipe, pipeline, virtual or 1, tiles) if balanced else None,
            "parallel.distributed_optimizer": True,
            "train.micro_batch_size": packs,
        }
        if balanced and settings["parallel.first_stage_layers"] is None:
            continue
        for comm in dict.fromkeys((recipe.parallel.context_comm, ContextComm.all_gather) if context > 1 else (None,)):
            with_comm = settings | ({"parallel.context_comm": comm} if comm else {})
            split = with_settings(recipe, with_comm)
            if any(problems(split, world_size)):
                continue
            layouts = (Layout(with_settings(split, way), world_size, device, tiles) for way in ways)
            most = Layout(with_settings(split, ways[-1]), world_size, device, tiles)  # computed again
            if most.fits:
                yield next(layout for layout in layouts if layout.fits)


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


def _first_stage(recipe: Recipe, pipeline: int, virtual: int, tiles: int) -> Optional[int]:
    """Decoder layers that leave the first stage, which has the ViT, as much work as the others; None if none do."""
    layers, flops = recipe.model.language.num_layers, step_flops(recipe, tiles)
    layer = (flops.linear + flops.attention) / layers
    if pipeline == 1 or not layer:
        return None
    wanted = (layers * layer - (pipeline - 1) * flops.vision) / pipeline / layer
    valid = [n for n in range(virtual, layers // pipeline, virtual) if (layers - n) % ((pipeline - 1) * virtual) == 0]
    return min(valid, key=lambda n: abs(n - wanted), default=None)


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """A copy with dotted ``parallel`` and ``train`` keys changed."""
    parallel, train, recompute = {}, {}, {}
    for key, value in settings.items():
        *blocks, name = key.split(".")
        {("parallel",): parallel, ("train",): train, ("train", "recompute"): recompute}[tuple(blocks)][name] = value
    return replace(
        recipe,
        parallel=replace(recipe.parallel, **parallel),
        train=replace(recipe.train, recompute=replace(recipe.train.recompute, **recompute), **train),
    )


def _settings(recipe: Recipe) -> dict[str, Any]:
    train = recipe.train
    return {
        **{f"parallel.{name}": getattr(recipe.parallel, name) for name in _PARALLEL},
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        **{f"train.recompute.{key}": value for key, value in vars(train.recompute).items()},
    }


def _text(value: Any) -> str:
    if isinstance(value, Enum):
        return value.value
    return "null" if value is None else str(value).lower()
