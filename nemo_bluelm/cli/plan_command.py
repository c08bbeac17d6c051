"""``nemo-bluelm plan``: what a recipe resolves to, before anything is trained."""

import argparse
import json
import re
from typing import TYPE_CHECKING

from nemo_bluelm.cli.arguments import add_json_argument, add_recipe_arguments, positive

if TYPE_CHECKING:  # it brings omegaconf, which --help needn't wait for
    from nemo_bluelm.config.schema import Recipe

# One tile, a phone screen, a page, a wide photo, the largest input (pixels, width x height).
_SIZES = [(378, 378), (1080, 2400), (1240, 1754), (1920, 1080), (1512, 1512)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument(
        "--world-size", type=positive, metavar="N", help="number of processes; adds the data-parallel size"
    )
    parser.add_argument(
        "--image",
        type=_size,
        action="append",
        metavar="WxH",
        help="count the tokens of this image size, in pixels; repeatable",
    )
    parser.add_argument(
        "--device", metavar="GPU", help="kind of GPU (h100, h200, a100, a100_40, b200): memory and time"
    )
    parser.add_argument(
        "--tiles",
        type=_count,
        metavar="N",
        help="image tiles in every pack; default: the most that it can hold, and FLOPs and time of text alone too",
    )
    parser.add_argument(
        "--propose",
        action="store_true",
        help="the fastest layout that fits --world-size GPUs of --device, and how it scales to 1024",
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        UserError: the recipe cannot train, whatever data it is given.
    """
    from nemo_bluelm.config.compose import load_without_data
    from nemo_bluelm.errors import UserError
    from nemo_bluelm.planner.devices import find_device
    from nemo_bluelm.planner.memory import most_tiles
    from nemo_bluelm.planner.summary import check_layout, device_summary, flops_summary, parameters, teacher_summary

    device = find_device(args.device) if args.device is not None else None
    if args.propose and not (device and args.world_size):
        raise UserError("--propose needs to know for what; add --world-size N --device h100")
    recipe, missing, config = load_without_data(args.recipe, args.overrides)
    most = most_tiles(recipe)
    tiles = most if args.tiles is None else min(args.tiles, most)
    with_text = args.tiles is None and most > 0
    problem = check_layout(recipe, args.world_size, device, tiles, args.propose)
    if args.tiles is not None and args.tiles > most:
        raise UserError(f"--tiles is {args.tiles}; {_limit(recipe, most)}")
    on_device = None
    if device is not None:
        world_size = args.world_size or _model_ranks(recipe)
        on_device = device_summary(recipe, world_size, device, tiles, args.propose, with_text, problem)
    plan = {
        "config": config,
        "missing": missing,
        "params": parameters(recipe),
        "teacher": teacher_summary(recipe),
        "images": _images(recipe, args.image or _SIZES),
        "layout": _layout(recipe, None if problem else args.world_size),
        "flops": flops_summary(recipe, tiles, with_text),
        "device": on_device,
    }
    if args.json:
        print(json.dumps(plan, indent=2))
    else:
        _show(plan, recipe)
    return 0


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in pixels, for example 1080x2400")
    return int(match[1]), int(match[2])


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _model_ranks(recipe: "Recipe") -> int:
    return recipe.parallel.tensor * recipe.parallel.pipeline * recipe.parallel.context


def _limit(recipe: "Recipe", most: int) -> str:
    from nemo_bluelm.config.schema import geometry_of

    data = recipe.data
    if most == data.max_tiles:
        return f"a pack holds {most} at most, data.max_tiles"
    tokens = geometry_of(recipe.model).tokens_per_tile
    return f"a pack holds {most} at most, data.sequence_length {data.sequence_length} at {tokens} tokens a tile"


def _images(recipe: "Recipe", sizes: list[tuple[int, int]]) -> list[dict]:
    from nemo_bluelm.config.schema import geometry_of

    shape = geometry_of(recipe.model)
    return [
        {
            "width": width,
            "height": height,
            "grid": list(shape.grid(width, height)),
            "tiles": shape.tiles(width, height),
            "tokens": shape.image_tokens(width, height),
        }
        for width, height in sizes
    ]


def _layout(recipe: "Recipe", world_size: int | None) -> dict:
    parallel, tokens = recipe.parallel, recipe.train.global_batch_size * recipe.data.sequence_length
    layout = {
        "tensor": parallel.tensor,
        "sequence": parallel.sequence,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "context": parallel.context,
        "ranks_per_model": _model_ranks(recipe),
        "tokens_per_step": tokens,
        "steps": recipe.train.steps,
        "tokens_of_the_run": tokens * recipe.train.steps,
    }
    if world_size is not None:
        layout["world_size"] = world_size
        layout["data"] = world_size // layout["ranks_per_model"]
        layout["microbatches"] = recipe.train.global_batch_size // layout["data"] // recipe.train.micro_batch_size
    return layout


def _show(plan: dict, recipe: "Recipe") -> None:
    import yaml
    from rich.console import Console
    from rich.table import Table

    console = Console()
    print(yaml.safe_dump(plan["config"], sort_keys=False).rstrip())
    if plan["missing"]:
        print(f"\nTo train, set what is mandatory: {' '.join(f'{key}=...' for key in plan['missing'])}")

    table = Table(title="Parameters")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("trained")
    trained = {"total": ""} | {part.value: "no" for part in recipe.train.freeze}
    if recipe.train.lora.rank:
        trained["language"] = "adapters"
    for part, count in plan["params"].items():
        table.add_row(part, f"{count:,}", trained.get(part, "yes"))
    teacher = plan["teacher"]
    if teacher and teacher["params"]:
        table.add_row("teacher", f"{teacher['params']['total']:,}", "no")
    console.print(table)
    if teacher and not teacher["params"]:
        print("Note: teacher not counted: distill.teacher names no run yet")
    if plan["config"]["objective"] == "grpo":
        print(
            "Note: counted is training on full packs of replies; writing them, their rewards and the reference are not"
        )

    table = Table(title=f"Images, in packs of {recipe.data.sequence_length} tokens")
    for name in ("width", "height", "grid", "tiles", "tokens"):
        table.add_column(name, justify="right")
    for image in plan["images"]:
        cols, rows = image["grid"]
        table.add_row(
            str(image["width"]), str(image["height"]), f"{cols} x {rows}", str(image["tiles"]), f"{image['tokens']:,}"
        )
    console.print(table)

    table = Table(title="Layout")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in plan["layout"].items():
        table.add_row(
            name.replace("_", " "), "-" if value is None else f"{value:,}" if type(value) is int else str(value)
        )
    console.print(table)

    from nemo_bluelm.cli.plan_tables import show_device, show_flops

    show_flops(console, plan["flops"])
    if plan["device"] is not None:
        show_device(console, plan["device"])
