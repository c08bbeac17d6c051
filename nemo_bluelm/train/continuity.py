"""Which checkpoint a run may go on from or start from: the keys that its weights and its data depend on."""

from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import Part, Recipe
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE, parts_in

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
)
WEIGHT_SHAPES = {
    Part.vision: ("model.vision.", "model.geometry.tile", "model.geometry.patch"),
    Part.projector: ("model.vision.hidden_size", "model.language.hidden_size", "model.geometry.merge"),
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
    key, now, then = _first_difference(recipe, _recipe_of(checkpoint), KEPT_ON_RESUME, MAY_MOVE)
    if key:
        raise UserError(
            f"{key} is {now}, but the run in {recipe.run_dir} was started with {then}; "
            "set it back, or choose another run_dir"
        )


def check_init(recipe: Recipe, checkpoint: Path, tokenizer: bytes) -> None:
    """Refuse weights of another shape, or weights whose token ids mean other tokens.

    Args:
        tokenizer: content of the run's tokenizer file.

    Raises:
        UserError: naming the key and both values.
    """
    origin, parts = _recipe_of(checkpoint), parts_in(checkpoint)
    check_shapes(recipe, origin, parts)
    if Part.language in parts and tokenizer != (checkpoint / TOKENIZER_FILE).read_bytes():
        raise UserError(
            f"data.tokenizer {recipe.data.tokenizer} in data.root is not the tokenizer that init_from "
            f"{recipe.init_from} was trained with; use {checkpoint / TOKENIZER_FILE}"
        )


def check_shapes(recipe: Recipe, origin: Recipe, parts: Iterable[Part] = tuple(Part)) -> None:
    """Refuse to start from weights of another shape, or to lose adapters.

    Args:
        origin: the recipe that the weights of ``init_from`` are or will be trained with.
        parts: those that there are weights of; the shapes of others don't matter.

    Raises:
        UserError: naming the key and both values.
    """
    keys = tuple(key for part in parts for key in WEIGHT_SHAPES[part])
    key, now, then = _first_difference(recipe, origin, keys, NO_SHAPE)
    if key:
        raise UserError(f"{key} is {now}, but init_from {recipe.init_from} was trained with {then}; make them equal")
    rank = origin.train.lora.rank
    if rank and recipe.train.lora.rank != rank and Part.language in parts:
        raise UserError(
            f"train.lora.rank is {recipe.train.lora.rank}, but init_from {recipe.init_from} has adapters of rank "
            f"{rank}; set train.lora.rank={rank}, or take them into the weights with 'nemo-bluelm merge'"
        )


def _recipe_of(checkpoint: Path) -> Recipe:
    return load_recipe(str(checkpoint / RECIPE_FILE), [])


def _first_difference(recipe: Recipe, other: Recipe, keys: tuple, but: tuple) -> tuple[str, Any, Any]:
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
