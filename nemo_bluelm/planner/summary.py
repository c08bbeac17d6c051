"""What ``nemo-bluelm plan`` says of GPUs, as plain values."""

from typing import Any, Optional

from nemo_bluelm.config.checks import check_recipe
from nemo_bluelm.config.layout import problems
from nemo_bluelm.config.schema import Recipe
from nemo_bluelm.errors import UserError
from nemo_bluelm.model.flops import pack_flops
from nemo_bluelm.planner.cost import step_flops
from nemo_bluelm.planner.devices import Device
from nemo_bluelm.planner.layouts import WORLDS, Layout, check_device, fastest, nearest, propose, scaling


def flops_summary(recipe: Recipe, tiles: int) -> dict[str, Any]:
    """Model FLOPs: of a token of text, of a token of a pack with ``tiles`` tiles, of a step and of the run.

    Packs are taken to be one document of full length, so these are the most that they can be.
    """
    train, length = recipe.train, recipe.data.sequence_length
    pack = step_flops(recipe, tiles)
    return {
        "tiles_per_pack": tiles,
        "per_text_token": pack_flops(recipe.model, [length], 0, train.freeze).total / length,
        "per_token": pack.total / length,
        "per_step": pack.total * train.global_batch_size,
        "run": pack.total * train.global_batch_size * train.steps,
        "pack": pack.to_dict(),
    }


def layout_summary(layout: Layout) -> dict[str, Any]:
    """Bytes by part for each pipeline stage, seconds of a step by cause, and the run's GPU-hours."""
    return {
        "gpus": layout.world_size,
        "global_batch_size": layout.recipe.train.global_batch_size,
        "needed_gib": layout.needed,
        "device_gib": layout.device.memory,
        "fits": layout.fits,
        "memory": [stage.to_dict() for stage in layout.memory],
        "step": layout.estimate.to_dict(),
        "gpu_hours": layout.estimate.gpu_hours(layout.recipe.train.steps),
    }


def device_summary(
    recipe: Recipe, world_size: int, device: Device, tiles: int, with_proposal: bool = False
) -> dict[str, Any]:
    """The recipe's own layout on GPUs of a kind; if it doesn't fit, the nearest that does; the fastest one on request.

    Args:
        recipe: one that passes ``check_recipe``.

    Raises:
        UserError: the device can't do the recipe's precision; no layout fits, but one was asked for.
    """
    check_device(recipe, device)
    own = Layout(recipe, world_size, device, tiles)
    summary = {"device": device.name, **layout_summary(own)}
    proposed = propose(recipe, world_size, device, tiles) if with_proposal or not own.fits else []
    if not own.fits:
        closest = nearest(recipe, proposed)
        summary["nearest"] = closest and closest.overrides(recipe)
        if closest is None:
            summary["nearest_gpus"] = _enough(recipe, world_size, device, tiles)
    if with_proposal:
        if not proposed:
            raise UserError(_too_few(recipe, world_size, device, tiles))
        best = proposed[0]
        summary["proposal"] = {"overrides": best.overrides(recipe), **layout_summary(best)}
        summary["scaling"] = [
            {
                "gpus": gpus,
                "same_batch": same and {"overrides": same.overrides(recipe), **layout_summary(same)},
                "grown_batch": grown and {"overrides": grown.overrides(recipe), **layout_summary(grown)},
            }
            for gpus, same, grown in scaling(recipe, world_size, device, tiles)
        ]
    return summary


def check_layout(recipe: Recipe, world_size: Optional[int], device: Optional[Device], tiles: int) -> None:
    """``check_recipe``, whose message names the nearest layout that has room too where the device is known.

    Raises:
        UserError: the recipe cannot train.
    """
    try:
        check_recipe(recipe, world_size)
    except UserError as error:
        problem = next(problems(recipe, world_size), None)
        if not (world_size and device and problem and str(error).startswith(problem)):  # not the layout's fault
            raise
        proposed = propose(recipe, world_size, device, tiles)
        if not proposed:
            raise
        settings = " ".join(nearest(recipe, proposed).overrides(recipe))
        raise UserError(f"{problem}; the nearest that fits {world_size} x {device.name}: {settings}") from error


def _enough(recipe: Recipe, world_size: int, device: Device, tiles: int) -> Optional[int]:
    """The least number of GPUs, a power of two above ``world_size``, that has a layout that fits."""
    more = (gpus for gpus in (2, 4, *WORLDS) if gpus > world_size)
    return next((gpus for gpus in more if fastest(recipe, gpus, device, tiles)), None)


def _too_few(recipe: Recipe, world_size: int, device: Device, tiles: int) -> str:
    enough = _enough(recipe, world_size, device, tiles)
    wayout = f"set --world-size {enough}" if enough else "lower data.sequence_length or choose a smaller model"
    return f"--world-size is {world_size}; no layout fits that many {device.name}, {wayout}"
