"""Import a Hugging Face folder as a checkpoint that ``init_from``, ``init_vision_from`` and ``prune`` take."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Optional

from nemo_bluelm.atomic import new_folder
from nemo_bluelm.config.compose import NO_CHECKPOINTS, load_without_data, to_yaml
from nemo_bluelm.config.schema import DistillConfig, Dtype, LoraConfig, ModelConfig, Part, Recipe
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE, WEIGHTS_DIR

CONFIG_FILE = "config.json"
DEFAULT_RECIPE = "text_pretrain"


@dataclass(frozen=True)
class Imported:
    """What became of a folder.

    Attributes:
        tensors: of the folder, how many went into each part.
        skipped: of the folder, how many were left out, by the reason.
        replaced: key of the recipe -> its value, and the folder's.
        vocabulary: rows of the embedding there and here; None without a language model.
    """

    tensors: Mapping[Part, int]
    skipped: Mapping[str, int]
    replaced: Mapping[str, tuple]
    vocabulary: Optional[tuple[int, int]]


def import_hf(source: Path, out: Path, recipe: Optional[str] = None, overrides: tuple[str, ...] = ()) -> Imported:
    """Write the checkpoint folder ``out``; it is there whole or not at all. Tensors keep their dtype.

    Args:
        source: folder with config.json, model.safetensors or its shards and index, and for a language model
            tokenizer.json.
        recipe: what the checkpoint carries for the shapes of parts that ``source`` lacks, and for all else;
            None takes the packaged one, its precision that of the weights.
        overrides: of the recipe.

    Raises:
        UserError: files missing or damaged, an architecture or weights that our model doesn't have, ``out`` exists or
            can't be written.
    """
    with new_folder(out) as partial_folder:
        from nemo_bluelm.runtime.environment import prepare

        prepare()
        return _import_into(partial_folder, source, recipe, overrides)


def _import_into(folder: Path, source: Path, name: Optional[str], overrides: tuple[str, ...]) -> Imported:
    from nemo_bluelm.convert.hf_config import understand
    from nemo_bluelm.convert.shards import DTYPES, Shards, read_json
    from nemo_bluelm.convert.table import SIGLIP, SIGLIP_BARE, count_bytes, entries, states
    from nemo_bluelm.convert.vocabulary import vocabulary, with_special_tokens, without_language
    from nemo_bluelm.convert.weights import write_weights

    carried, _, _ = load_without_data(name or DEFAULT_RECIPE, [*NO_CHECKPOINTS, *overrides])
    found = understand(read_json(source / CONFIG_FILE), source / CONFIG_FILE, carried.model)
    shards = Shards(source)
    layout = found.layout
    if layout is SIGLIP and not any(key.startswith(SIGLIP[Part.vision]) for key in shards.headers):
        layout = SIGLIP_BARE
    wanted = list(entries(found.model, layout))
    skipped = _check_names(shards, wanted, found.ignored)

    model, rows = found.model, None
    if Part.language in layout:
        content, rows = with_special_tokens(source / TOKENIZER_FILE), model.language.vocab_size
        size = max(vocabulary(rows, content), found.padded, carried.model.language.vocab_size if name else 0)
        model = replace(model, language=replace(model.language, vocab_size=size))
    else:
        content = without_language()
    pieces = list(_pieces(shards, wanted, model.language.vocab_size))
    dtypes = {piece.dtype for piece in pieces}
    needed, free = sum(count_bytes(p.shape, p.dtype) for p in pieces), shutil.disk_usage(folder).free
    if needed > free:
        room = f"{free / 2**20:,.1f} MiB free and the weights take {needed / 2**20:,.1f}"
        raise UserError(f"{folder.parent} has {room}; make room")
    (folder / WEIGHTS_DIR).mkdir()
    write_weights(folder / WEIGHTS_DIR, pieces, states(model, layout))
    recipe = _recipe(carried, model)
    if name is None:
        precision = replace(recipe.precision, dtype=Dtype.fp32 if dtypes == {DTYPES["F32"]} else Dtype.bf16)
        recipe = replace(recipe, name="import", precision=precision)
    (folder / RECIPE_FILE).write_text(to_yaml(recipe))
    (folder / TOKENIZER_FILE).write_bytes(content)
    counts = {part: sum(len(entry.theirs) for entry in wanted if entry.part is part) for part in layout}
    replaced = dict(_differences(carried.model, model)) if name else {}
    return Imported(counts, skipped, replaced, rows and (rows, model.language.vocab_size))


def _check_names(shards, wanted: list, ignored: Mapping[str, str]) -> dict[str, int]:
    """How many tensors are left out, by the reason.

    Raises:
        UserError: one is missing, of another shape or dtype, or has no place in our model.
    """
    from nemo_bluelm.convert.shards import DTYPES

    names = {name: shape for entry in wanted for name, shape in zip(entry.theirs, entry.shapes)}
    missing = sorted(names.keys() - shards.headers)
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise UserError(f"{shards.folder} lacks {missing[0]}{more} that its {CONFIG_FILE} asks for; fetch it again")
    skipped: dict[str, int] = {}
    for name, (path, dtype, shape) in shards.headers.items():
        if name in names:
            if shape != names[name]:
                raise UserError(
                    f"{path}: {name} is {_text(shape)}, and by {CONFIG_FILE} it is {_text(names[name])}; "
                    "fetch both again"
                )
            if dtype not in DTYPES:
                raise UserError(f"{path}: {name} is {dtype}; import the model in {', '.join(DTYPES)}")
            continue
        reason = next((why for start, why in ignored.items() if name.startswith(start)), None)
        if reason is None and name.endswith("rotary_emb.inv_freq"):
            reason = "computed"
        if reason is None:
            raise UserError(f"{path}: {name} has no place in our model; import one without it")
        skipped[reason] = skipped.get(reason, 0) + 1
    return skipped


def _pieces(shards, wanted: list, vocabulary: int) -> Iterator:
    """Every tensor of the checkpoint, an embedding's further rows as pieces of their own."""
    import torch

    from nemo_bluelm.convert.shards import DTYPES
    from nemo_bluelm.convert.vocabulary import new_rows
    from nemo_bluelm.convert.weights import Piece

    def read(entry) -> torch.Tensor:
        return entry.to_ours([shards.read(name) for name in entry.theirs])

    for entry in wanted:
        kinds = {DTYPES[shards.headers[name].dtype] for name in entry.theirs}
        if len(kinds) > 1:
            raise UserError(f"{shards.folder}: {' and '.join(entry.theirs)} have two dtypes; save them in one")
        (dtype,) = kinds
        layer, shape = entry.layer, entry.shape
        if layer is not None:
            offset, whole = (layer, *(0 for _ in shape)), (entry.layers, *shape)
            yield Piece(entry.ours, whole, offset, (1, *shape), dtype, partial(read, entry))
            continue
        offset, further = (0,) * len(shape), vocabulary - shape[0] if entry.vocabulary else 0
        whole = (shape[0] + further, *shape[1:])
        yield Piece(entry.ours, whole, offset, shape, dtype, partial(read, entry))
        if further:
            padding = (further, *shape[1:])
            of_mean = partial(lambda entry, count: new_rows(read(entry), count), entry, further)
            yield Piece(entry.ours, whole, (shape[0], *offset[1:]), padding, dtype, of_mean)


def _recipe(carried: Recipe, model: ModelConfig) -> Recipe:
    """What a checkpoint of these weights carries: no other weights than its own, no adapters."""
    train = replace(carried.train, lora=LoraConfig())
    return replace(carried, model=model, train=train, distill=DistillConfig(), init_from=None, init_vision_from=None)


def _differences(before: ModelConfig, after: ModelConfig) -> Iterator[tuple[str, tuple]]:
    def flat(values: dict, prefix: str) -> Iterator[tuple[str, object]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    now = dict(flat(asdict(after), "model."))
    return ((key, (value, now[key])) for key, value in flat(asdict(before), "model.") if value != now[key])


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
