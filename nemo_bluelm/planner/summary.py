"""What ``nemo-bluelm plan`` says of GPUs, as plain values."""

from dataclasses import replace
from typing import Any, Optional

from nemo_bluelm.config.checks import check_all_but_layout, check_recipe
from nemo_bluelm.config.layout import problems
from nemo_bluelm.config.schema import ParallelConfig, Recipe
from nemo_bluelm.errors import UserError
from nemo_bluelm.planner.cost import model_flops, step_flops
from nemo_bluelm.planner.devices import Device
from nemo_bluelm.planner.layouts import WORLDS, Layout, best, check_device, fastest, nearest, scaling, with_batch
from nemo_bluelm.planner.memory import stage_weights
from nemo_bluelm.planner.teacher import teacher_beside


def parameters(recipe: Recipe) -> dict[str, int]:
    """By part and in total, of the whole model, by arithmetic; tied embeddings count once."""
    counts = stage_weights(replace(recipe, parallel=ParallelConfig()), 0)
    return {**counts._asdict(), "total": sum(counts)}


def teacher_summary(recipe: Recipe) -> Optional[dict[str, Any]]:
    """The run that ``distill.teacher`` names and its :func:`parameters`, None of a run that isn't there yet; None
    without a teacher."""
    if recipe.distill.teacher is None:
        return None
    beside = teacher_beside(recipe)
    return {"run": recipe.distill.teacher, "params": beside and parameters(beside)}


def flops_summary(recipe: Recipe, tiles: int, with_text: bool = False) -> dict[str, Any]:
    """Model FLOPs: of a token of text, of a token of a pack with ``tiles`` tiles, of a step and of the run.

    Packs are taken to be one document of full length, so these are the most that they can be. A frozen teacher's
    forward pass is counted, except under "pack".

    Args:
        with_text: the same for packs without tiles, under "text".
    """
    pack, text = (model_flops(recipe, count) for count in (tiles, 0))
    found = {"tiles_per_pack": tiles, "per_text_token": text / recipe.data.sequence_length, **_totals(recipe, pack)}
    of_pack = step_flops(recipe, tiles).to_dict()
    return {**found, "pack": of_pack, "text": _totals(recipe, text) if with_text else None}


def _totals(recipe: Recipe, pack: int) -> dict[str, float]:
    step = pack * recipe.train.global_batch_size
    return {"per_token": pack / recipe.data.sequence_length, "per_step": step, "run": step * recipe.train.steps}


def layout_summary(layout: Layout, with_text: bool = False) -> dict[str, Any]:
    """Bytes by part for each pipeline stage, seconds of a step by cause, and the run's GPU-hours.

    Args:
        with_text: time of packs without tiles too, under "text"; memory is that of ``layout.tiles``.
    """
    return {
        "gpus": layout.world_size,
        "global_batch_size": layout.recipe.train.global_batch_size,
        "needed_gib": layout.needed,
        "device_gib": layout.device.memory,
        "fits": layout.fits,
        "memory": [stage.to_dict() for stage in layout.memory],
        **_time(layout),
        "text": _time(replace(layout, tiles=0)) if with_text else None,
    }


def _time(layout: Layout) -> dict[str, Any]:
    found = layout.estimate
    hours = found.gpu_hours(layout.recipe.train.steps)
    return {"tiles_per_pack": layout.tiles, "step": found.to_dict(), "gpu_hours": hours}


def device_summary(
    recipe: Recipe,
    world_size: int,
    device: Device,
    tiles: int,
    with_proposal: bool = False,
    with_text: bool = False,
    problem: Optional[str] = None,
) -> dict[str, Any]:
    """The recipe's own layout on GPUs of a kind; if it doesn't fit, the nearest that does; the fastest one on request.

    Args:
        recipe: one that passes ``check_recipe``, or has ``problem``.
        tiles: image tiles in every pack.
        with_text: time of packs without tiles too.
        problem: why the recipe's own layout can't be, which is all that is said of it.

    Raises:
        UserError: the device can't do the recipe's precision; no layout fits, but one was asked for.
    """
    check_device(recipe, device)

    def described(layout: Optional[Layout]) -> Optional[dict[str, Any]]:
        return layout and {"overrides": layout.overrides(recipe), **layout_summary(layout, with_text)}

    summary = {"device": device.name, "gpus": world_size, "problem": problem}
    if problem is None:
        own = Layout(recipe, world_size, device, tiles)
        summary |= layout_summary(own, with_text)
        if not own.fits:
            closest = nearest(recipe, world_size, device, tiles)
            summary["nearest"] = closest and closest.overrides(recipe)
            if closest is None:
                summary["nearest_gpus"] = _enough(recipe, world_size, device, tiles)
    if with_proposal:
        proposed = fastest(recipe, world_size, device, tiles)
        if proposed is None:
            raise UserError(_too_few(recipe, world_size, device, tiles))
        summary["proposal"] = described(proposed)
        is_same = proposed.recipe.train.global_batch_size == recipe.train.global_batch_size
        summary["own_batch"] = None if is_same else described(best(recipe, world_size, device, tiles))
        summary["scaling"] = [
            {"gpus": gpus, "same_batch": described(same), "grown_batch": described(grown)}
            for gpus, same, grown in scaling(recipe, proposed)
        ]
    return summary


def check_layout(
    recipe: Recipe, world_size: Optional[int], device: Optional[Device], tiles: int, proposing: bool = False
) -> Optional[str]:
    """``check_recipe``, whose message names the nearest layout that has room too where the device is known.

    Returns:
        What is wrong with the layout if another one is going to be proposed; None if nothing is.

    Raises:
        UserError: the recipe cannot train.
    """
    check_all_but_layout(recipe)
    try:
        check_recipe(recipe, world_size)
    except UserError as error:
        # Written for `train`; here the number of processes has another option.
        message, problem = (
            text.replace("--nproc", "--world-size") for text in (str(error), next(problems(recipe, world_size)))
        )
        if proposing:
            return problem
        closest = nearest(recipe, world_size, device, tiles) if world_size and device else None
        if closest is None:
            raise UserError(message) from error
        settings = " ".join(closest.overrides(recipe))
        raise UserError(f"{problem}; the nearest that fits {world_size} x {device.name}: {settings}") from error
    return None


def _enough(recipe: Recipe, world_size: int, device: Device, tiles: int) -> Optional[int]:
    """The least number of GPUs, a power of two above ``world_size``, that has a layout that fits."""
    more = (gpus for gpus in (2, 4, *WORLDS) if gpus > world_size)
    return next((gpus for gpus in more if fastest(recipe, gpus, device, tiles)), None)


def _too_few(recipe: Recipe, world_size: int, device: Device, tiles: int) -> str:
    packs = recipe.train.global_batch_size
    if packs % world_size:  # perhaps all that is wrong: the batch is only doubled
        even = max(1, round(packs / world_size)) * world_size
        if best(with_batch(recipe, even), world_size, device, tiles):
            return (
                f"train.global_batch_size is {packs}, which --world-size {world_size} can't share evenly in any layout "
                f"that fits; set train.global_batch_size={even}"
            )
    enough = _enough(recipe, world_size, device, tiles)
    wayout = f"set --world-size {enough}" if enough else "lower data.sequence_length or choose a smaller model"
    return f"--world-size is {world_size}; no layout fits that many {device.name}, {wayout}"
