"""Weights out of a checkpoint that has fewer or more of them than the model: what is loaded, new, left out."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

from nemo_bluelm.config.schema import Part
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import WEIGHTS_DIR, Origin
from nemo_bluelm.runtime.single import STATE_PREFIX
from nemo_bluelm.runtime.storage import reading


class Split(NamedTuple):
    """A model's sharded state, by whether the checkpoint has it; both halves nested as the whole."""

    found: dict[str, Any]  # to be loaded
    new: dict[str, Any]  # tensors of the model itself, which stay as they are


def split(state: dict[str, Any], origin: Origin) -> Split:
    """What of a model's sharded state a checkpoint has; rank 0 prints a line for each part of the model.

    All ranks must call it.

    Args:
        state: of the whole LightningModule, or of each of its virtual stages by name.
        origin: parts of it that are not named count as missing there.

    Raises:
        UserError: a tensor has another shape there, or it has none of the model's.
    """
    key, checkpoint, parts = origin
    with reading(checkpoint):
        stored = load_sharded_metadata(str(checkpoint / WEIGHTS_DIR))
    ours = tuple(f"{STATE_PREFIX}{part.value}." for part in parts)
    stored = {name: entry for name, entry in stored.items() if name.startswith(ours)}
    shapes = {
        name.removeprefix(STATE_PREFIX): tuple(entry.global_shape)
        for name, entry in stored.items()
        if isinstance(entry, ShardedTensor)
    }
    objects = {entry.unique_key for entry in stored.values() if isinstance(entry, ShardedObject)}
    wanted = {piece.key.removeprefix(STATE_PREFIX): tuple(piece.global_shape) for piece in _pieces(state)}
    for name, shape in wanted.items():
        if shapes.get(name, shape) != shape:
            raise UserError(
                f"{key} {checkpoint}: {name} is {_shape(shapes[name])} there and {_shape(shape)} in this run; "
                "make the shapes in model equal"
            )
    everywhere = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    torch.distributed.all_gather_object(
        everywhere, set(wanted), group=parallel_state.get_pipeline_model_parallel_group()
    )
    names = set().union(*everywhere)
    if not names & set(shapes):
        raise UserError(f"{key} {checkpoint} has no weight of this model; name another checkpoint, or null")
    if torch.distributed.get_rank() == 0:
        for line in report(names, set(shapes), parts):
            print(f"{key} {checkpoint}  {line}", file=sys.stderr)
    return Split(_half(state, shapes, objects, True), _half(state, shapes, objects, False))


def report(model: set[str], checkpoint: set[str], parts: Iterable[Part] = tuple(Part)) -> Iterator[str]:
    """A line for each of ``parts``: how many tensors are loaded, new in the model, left out; the first name of each.

    Args:
        model, checkpoint: names of tensors. The decoder's layers are one tensor, stacked; the ViT's are one each.
    """
    kinds = {"loaded": model & checkpoint, "new": model - checkpoint, "skipped": checkpoint - model}
    for part in parts:
        found = {kind: sorted(n for n in names if n.startswith(f"{part.value}.")) for kind, names in kinds.items()}
        named = [
            f"{kind}: {found[kind][0]}" + (", ..." if len(found[kind]) > 1 else "")
            for kind in ("new", "skipped")
            if found[kind] and (found["loaded"] or kind == "skipped")
        ]
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in found.items())
        yield f"{part.value}: {counts} tensors" + (f" ({'; '.join(named)})" if named else "")


def joined(*states: dict[str, Any]) -> dict[str, Any]:
    """One state of several, nested alike: what was loaded, and the model's own tensors where nothing was."""
    whole: dict[str, Any] = {}
    for state in states:
        for name, entry in state.items():
            if isinstance(entry, dict):
                whole[name] = joined(whole.get(name, {}), entry)
            else:
                whole[name] = (
                    entry.data if isinstance(entry, (ShardedTensor, ShardedObject, ShardedTensorFactory)) else entry
                )
    return whole


def _pieces(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    """Every tensor of a nested state; a fused one (SwiGLU's two halves) in its pieces, which share their name."""
    for entry in state.values():
        if isinstance(entry, dict):
            yield from _pieces(entry)
        elif isinstance(entry, ShardedTensorFactory):
            yield from entry.build()
        elif isinstance(entry, ShardedTensor):
            yield entry


def _half(state: dict[str, Any], shapes: dict[str, tuple], objects: set[str], found: bool) -> dict[str, Any]:
    """The entries that the checkpoint has, or those that it lacks."""
    half = {}
    for name, entry in state.items():
        if isinstance(entry, dict):
            half[name] = _half(entry, shapes, objects, found)
            continue
        if isinstance(entry, ShardedObject):
            there = entry.unique_key in objects
        elif isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
            there = entry.key.removeprefix(STATE_PREFIX) in shapes
        else:
            there = True
        if there == found:
            half[name] = entry
    return half


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
