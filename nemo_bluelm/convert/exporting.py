"""Our checkpoints as Hugging Face models: a stream of tensors, or a folder that transformers and vLLM load."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from nemo_bluelm.atomic import new_folder
from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import Dtype, Part, Recipe
from nemo_bluelm.convert.hf_config import Flavour
from nemo_bluelm.convert.hf_files import (
    MODEL_MAP,
    export_config,
    rows_of,
    write_card,
    write_code,
    write_json,
    write_processors,
    write_tokenizer,
)
from nemo_bluelm.convert.native import demand_native
from nemo_bluelm.convert.shards import SHARD_BYTES, write_shards
from nemo_bluelm.convert.table import EXPORT, Entry, count_bytes, entries
from nemo_bluelm.convert.weights import Weights
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE, parts_in

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """What an export has.

    Attributes:
        tensors: how many, by the part of ours that they are of.
        size: of the weights, in bytes.
        vocabulary: rows of the embedding in the checkpoint and in the export.
    """

    tensors: Mapping[Part, int]
    size: int
    vocabulary: tuple[int, int]


def export_state(
    checkpoint: Path, layout: Optional[Mapping[Part, str]] = None, vocabulary: Optional[int] = None
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, one by one, in the dtype that the checkpoint has; of any parallel layout.

    Args:
        checkpoint: as :func:`nemo_bluelm.runtime.run_dir.resolve_checkpoint` gives it.
        layout: prefix of each part, one of those in ``table``; None takes our export's, of the parts that are there.
        vocabulary: rows of embedding and head to keep; None keeps all.

    Raises:
        UserError: the weights can't be read, lack one of the parts, or have something that the layout doesn't.
    """
    weights, found, _ = _open(checkpoint, layout)
    return _stream(weights, found, vocabulary)


def export_hf(
    checkpoint: Path,
    out: Path,
    flavour: Flavour = Flavour.exact,
    dtype: Optional[torch.dtype] = None,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Write a folder of Hugging Face's; it is there whole or not at all. Tensors are converted one by one.

    Rows of the vocabulary that only pad it are left out. A checkpoint that lacks parts of the model makes a folder for
    ``import`` alone.

    Args:
        dtype: of the weights; None takes BF16 of a model that is trained so, else what the checkpoint has.
        shard_bytes: size of a file of weights, if not one tensor is larger.

    Raises:
        UserError: as :func:`export_state`; the flavour can't express the model; ``out`` exists or can't be written.
    """
    if shard_bytes < 1:
        raise UserError(f"a shard of {shard_bytes} bytes holds nothing; give 1 or more")
    weights, found, recipe = _open(checkpoint, None)
    parts = {entry.part for entry in found}
    if flavour is Flavour.native:
        demand_native(recipe.model, parts)
    if dtype is None and recipe.precision.dtype is Dtype.bf16:
        dtype = torch.bfloat16
    tokenizer = Tokenizer.load(checkpoint / TOKENIZER_FILE)
    rows, vocabulary = recipe.model.language.vocab_size, rows_of(recipe, tokenizer)
    headers = [
        (name, dtype or weights.tensors[entry.ours].properties.dtype, (vocabulary, *shape[1:]) if cut else shape)
        for entry in found
        for cut in [entry.vocabulary]
        for name, shape in zip(entry.theirs, entry.shapes)
    ]
    size = sum(count_bytes(shape, kind) for _, kind, shape in headers)
    with new_folder(out) as folder:
        free = shutil.disk_usage(folder).free
        if size > free:
            room = f"{free / 2**20:,.1f} MiB free and the weights take {size / 2**20:,.1f}"
            raise UserError(f"{out.parent} has {room}; make room")
        stream = (tensor.to(kind) for (_, tensor), (_, kind, _) in zip(_stream(weights, found, vocabulary), headers))
        write_shards(folder, headers, stream, shard_bytes)
        config = export_config(recipe, parts, tokenizer, flavour)
        kind = str(dtype or headers[0][1]).removeprefix("torch.")
        config |= {"dtype": kind, "torch_dtype": kind}  # transformers 5's name and 4's
        whole = parts == set(Part)
        if whole:
            if flavour is Flavour.exact:
                config["auto_map"] = MODEL_MAP
            write_code(folder, flavour)
            write_processors(folder, recipe, flavour)
        write_json(folder / "config.json", config)
        write_tokenizer(folder, tokenizer, recipe, flavour)
        write_card(folder, checkpoint, recipe, whole, flavour)
    counts = {part: sum(len(entry.theirs) for entry in found if entry.part is part) for part in Part if part in parts}
    return Exported(counts, size, (rows, vocabulary))


def _open(checkpoint: Path, layout: Optional[Mapping[Part, str]]) -> tuple[Weights, list[Entry], Recipe]:
    from nemo_bluelm.runtime.environment import prepare

    prepare()
    recipe = load_recipe(str(checkpoint / RECIPE_FILE), [])
    if recipe.train.lora.rank:
        raise UserError(f"{checkpoint} has LoRA adapters; merge them with 'nemo-bluelm merge' and export the result")
    if recipe.model.vision.tower != "siglip2":
        raise UserError(
            f"{checkpoint} has the vision tower {recipe.model.vision.tower}, which no exported model knows; write an "
            "exporter of its own (entry point group nemo_bluelm.exporters)"
        )
    weights, there = Weights(checkpoint), parts_in(checkpoint)
    if layout is None:
        layout = {part: prefix for part, prefix in EXPORT.items() if part in there}
    found = list(entries(recipe.model, layout))
    names = {entry.ours for entry in found}
    stored = {name for name in weights.tensors if Part(name.split(".")[0]) in layout}
    for name in sorted(names - stored):
        raise UserError(f"{checkpoint} lacks {name}; export another checkpoint")
    for name in sorted(stored - names):
        raise UserError(f"{checkpoint} has {name}, which has no place in a Hugging Face model; export another one")
    return weights, found, recipe


def _stream(weights: Weights, found: list[Entry], vocabulary: Optional[int]) -> Iterator[tuple[str, Tensor]]:
    for entry in found:
        tensor = weights.read(entry.ours, entry.layer)
        if entry.vocabulary and vocabulary is not None:
            tensor = tensor[:vocabulary]
        yield from zip(entry.theirs, entry.to_theirs(tensor))
