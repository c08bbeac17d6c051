"""Which checkpoint a run may go on from or start from: the keys that its weights and its data depend on."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import Part, Recipe
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE, Origin, resolve_checkpoint

# A resumed run must keep these to give what the uninterrupted run would have given; other keys may change.
KEPT_ON_RESUME = (
    "model.",
    "data.",
    "precision.",
    "optim.",  # Megatron restores the optimizer's own settings, so a change here would be ignored
    "seed",
    "train.global_batch_size",
    "train.freeze",
    "distill.",
    "train.lora.",
    "parallel.context",
    "objective",
    "stage",
    "grpo.",
    "environments.",
)
# The plan's identity tells whether the content of root and tokenizer is the same; the rest changes no token or pixel.
MAY_MOVE = (
    "data.root",
    "data.tokenizer",
    "data.index",
    "data.max_bad_fraction",
    "data.decode.device",
    "data.decode.threads",
    "data.decode.prefetch",
    "grpo.validation.",
    "grpo.generation.batch",
)
WEIGHT_SHAPES = {
    Part.vision: ("model.vision.", "model.geometry.tile", "model.geometry.patch"),
    Part.projector: (
        "model.projector.",
        "model.vision.hidden_size",
        "model.language.hidden_size",
        "model.geometry.merge",
    ),
    Part.language: ("model.language.",),
}
NO_SHAPE = (
    "model.vision.num_layers",  # each has tensors of its own: those that a checkpoint lacks are new, others left out
    "model.language.init_method_std",
    "model.language.yarn.",
    "model.language.rotary_base",
)


def check_resume(recipe: Recipe, checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint of this run folder whose recipe differs where it matters.

    Raises:
        UserError: naming the key and both values.
    """
    key, now, then = first_difference(recipe, _recipe_of(checkpoint), KEPT_ON_RESUME, MAY_MOVE)
    if key:
        raise UserError(
            f"{key} is {now}, but the run in {recipe.run_dir} was started with {then}; "
            "set it back, or choose another run_dir"
        )


def resume_notices(recipe: Recipe, checkpoint: Path) -> list[str]:
    """A line for each key that may be changed on resume, but does not do there what it does to a fresh run."""
    then = _recipe_of(checkpoint)
    notices = []
    for key in ("init_from", "init_vision_from"):
        if getattr(recipe, key) != getattr(then, key):
            notices.append(
                f"{key} is {getattr(recipe, key)}, but the run was started with {getattr(then, key)} and goes on from "
                f"its own {checkpoint}; to start from other weights, choose another run_dir"
            )
    if recipe.train.steps != then.train.steps:
        notices.append(
            f"train.steps is {recipe.train.steps}, but was {then.train.steps} up to {checkpoint.name}: from there the "
            "learning rate follows the other schedule"
        )
    return notices


def origin_parts(recipe: Recipe) -> dict[str, tuple[Part, ...]]:
    """The parts that a fresh run starts with from each checkpoint, by the recipe's key that names it."""
    if recipe.init_vision_from is None:
        return {} if recipe.init_from is None else {"init_from": tuple(Part)}
    others = tuple(part for part in Part if part is not Part.vision)
    return {**({} if recipe.init_from is None else {"init_from": others}), "init_vision_from": (Part.vision,)}


def find_origins(recipe: Recipe) -> list[Origin]:
    """
    Raises:
        UserError: a folder that is no checkpoint.
    """
    return [
        Origin(key, resolve_checkpoint(getattr(recipe, key), key), parts) for key, parts in origin_parts(recipe).items()
    ]


def check_init(recipe: Recipe, origin: Origin, tokenizer: bytes) -> None:
    """Refuse weights of another shape, or weights whose token ids mean other tokens.

    Args:
        tokenizer: content of the run's tokenizer file.

    Raises:
        UserError: naming the key and both values.
    """
    key, checkpoint, _ = origin
    parts = origin.parts_there()
    check_shapes(recipe, _recipe_of(checkpoint), parts, key)
    if Part.language in parts and tokenizer != (checkpoint / TOKENIZER_FILE).read_bytes():
        raise UserError(
            f"data.tokenizer {recipe.data.tokenizer} in data.root is not the tokenizer that {key} "
            f"{getattr(recipe, key)} was trained with; use {checkpoint / TOKENIZER_FILE}"
        )


def check_frozen(recipe: Recipe, origins: Sequence[Origin]) -> None:
    """Refuse to freeze what no checkpoint has weights of, in a run that starts from one and sees images.

    Raises:
        UserError: naming the part.
    """
    there = set().union(*(origin.parts_there() for origin in origins))
    for part in recipe.train.freeze if origins else ():
        if part not in there:
            named = " and ".join(f"{origin.key} {getattr(recipe, origin.key)}" for origin in origins)
            key = "init_vision_from" if part is Part.vision else "init_from"
            raise UserError(
                f"train.freeze has {part.value}, but there are no weights of it in {named}, and it would stay random; "
                f"set {key} to a checkpoint that has them, or train it"
            )


def check_shapes(
    recipe: Recipe, origin: Recipe, parts: Iterable[Part] = tuple(Part), origin_key: str = "init_from"
) -> None:
    """Refuse to start from weights of another shape, or to lose adapters.

    Args:
        origin: the recipe that the weights are or will be trained with.
        parts: those that there are weights of; the shapes of others don't matter.
        origin_key: the recipe's key that names them.

    Raises:
        UserError: naming the key and both values.
    """
    keys = tuple(key for part in parts for key in WEIGHT_SHAPES[part])
    named = f"{origin_key} {getattr(recipe, origin_key)}"
    key, now, then = first_difference(recipe, origin, keys, NO_SHAPE)
    if key:
        raise UserError(f"{key} is {now}, but {named} was trained with {then}; make them equal")
    if origin.train.lora.rank and Part.language in parts:
        key, now, then = first_difference(recipe, origin, ("train.lora.",), ("train.lora.dropout",))
        if key:
            raise UserError(
                f"{key} is {now}, but {named} has adapters with {then}; make them equal, or take the adapters into the "
                "weights with 'nemo-bluelm merge'"
            )


def _recipe_of(checkpoint: Path) -> Recipe:
    return load_recipe(str(checkpoint / RECIPE_FILE), [])


def first_difference(recipe: Recipe, other: Recipe, keys: tuple, but: tuple) -> tuple[str, Any, Any]:
    """The first key in which two recipes differ, and both values; the key is empty where they don't.

    Args:
        keys: keys that matter, or the beginnings of them.
        but: those of them that don't.
    """
    now, then = _flat(recipe), _flat(other)
    for key in sorted(set(now) | set(then)):
        matters = key.startswith(keys) and not key.startswith(but)
        if matters and now.get(key) != then.get(key):
            return key, now.get(key), then.get(key)
    return "", None, None


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """A recipe as {dotted key: value}."""
    if is_dataclass(node):
        node = asdict(node)
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for name, child in node.items() for k, v in _flat(child, f"{prefix}.{name}".lstrip(".")).items()}
