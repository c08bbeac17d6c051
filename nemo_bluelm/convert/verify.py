"""Does an exported folder compute what its checkpoint computes? Asked of every stage, in fp32."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import ModelConfig, Part, Recipe
from nemo_bluelm.convert.exporting import export_state
from nemo_bluelm.convert.hf_config import MODEL_TYPES, Flavour
from nemo_bluelm.convert.hf_files import export_config, image_config, rows_of, token_ids
from nemo_bluelm.convert.native import NATIVE_NOTE
from nemo_bluelm.convert.shards import DTYPES, Shards, read_json
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE

LIMIT = 1e-5  # largest difference, as a share of the largest value or of 1
_CODE = ("auto_map", "dtype", "torch_dtype")  # of config.json, not the model's


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        figure: largest difference, or how many things differ.
        limit: of ``figure``.
        detail: what differs, in a line.
    """

    stage: str
    case: str
    figure: float
    limit: float = 0.0
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.figure <= self.limit


def verify(folder: Path, checkpoint: Path) -> Iterator[Check]:
    """Compare the files first, then, where these agree, what both models make of prompts. Runs the folder's code.

    Raises:
        UserError: a file is missing or damaged, or the folder is no whole export of ours.
    """
    from nemo_bluelm.runtime.environment import prepare

    prepare()
    recipe, tokenizer = load_recipe(str(checkpoint / RECIPE_FILE), []), Tokenizer.load(checkpoint / TOKENIZER_FILE)
    config = read_json(folder / "config.json")
    flavour = MODEL_TYPES.get(config.get("model_type"))
    if flavour is None or set(config.get("parts", ())) != {part.value for part in Part}:
        raise UserError(f"{folder} is no whole model exported by 'nemo-bluelm export hf'; export one and verify that")
    shards, same = Shards(folder), True
    checks = [*_configs(folder, config, recipe, tokenizer, flavour), _tensors(shards, checkpoint, tokenizer, recipe)]
    for check in checks:
        same = same and check.passed
        yield check
    if same:
        from nemo_bluelm.convert.verify_models import compare_models

        kinds = {DTYPES[header.dtype] for header in shards.headers.values()}
        rounding = torch.bfloat16 if torch.bfloat16 in kinds else None
        yield from compare_models(folder, checkpoint, recipe, tokenizer, flavour, rounding)


def verdict(folder: Path, checkpoint: Path, checks: list[Check]) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {
        "folder": folder.name,
        "checkpoint": checkpoint.name,
        "passed": all(check.passed for check in checks),
        "notes": notes(folder),
        "checks": [{**asdict(check), "passed": check.passed} for check in checks],
    }


def notes(folder: Path) -> list[str]:
    """What the checks of a folder say nothing about."""
    native = MODEL_TYPES.get(read_json(folder / "config.json").get("model_type")) is Flavour.native
    return [NATIVE_NOTE] if native else []


def difference(one: Tensor, two: Tensor) -> float:
    """Largest difference of two tensors of a shape, as a share of the largest value or of 1; inf of two shapes."""
    if one.shape != two.shape:
        return float("inf")
    scale = max(1.0, one.abs().max().item())
    found = (one.double() - two.double()).abs().max().item() / scale
    return found if found == found else float("inf")


def _configs(folder: Path, config: dict, recipe: Recipe, tokenizer: Tokenizer, flavour: Flavour) -> Iterator[Check]:
    model = recipe.model
    ids, wanted = token_ids(tokenizer), export_config(recipe, set(Part), tokenizer, flavour)
    found = {key: value for key, value in config.items() if key not in _CODE}
    yield _same("config.json", found, json.loads(json.dumps(wanted)))
    text = config.get("text_config", {})
    yield _same("RoPE in both styles", *_rope(text, model))
    generation = read_json(folder / "generation_config.json")
    yield _same("generation_config.json", {key: generation.get(key) for key in ids}, ids)
    yield _same("tiles", read_json(folder / "preprocessor_config.json"), image_config(recipe, flavour))
    try:
        equal = (folder / TOKENIZER_FILE).read_bytes() == tokenizer.content
    except OSError as error:
        raise UserError(f"{folder / TOKENIZER_FILE} can't be read: {error.strerror}; export the model again") from error
    yield Check("config", TOKENIZER_FILE, 1 - equal, detail="" if equal else "not the checkpoint's")


def _rope(text: dict, model: ModelConfig) -> tuple[dict, dict]:
    """What transformers 4 and 5 read from a config, and from another."""
    yarn = model.language.yarn
    four, five = text.get("rope_scaling") or {"rope_type": "default"}, dict(text.get("rope_parameters") or {})
    found = {"theta 4": text.get("rope_theta"), "theta 5": five.pop("rope_theta", None), "4": four, "5": five}
    factor = text.get("max_position_embeddings", 0) / yarn.original_max_position_embeddings
    found |= {"positions": factor}
    theta = float(model.language.rotary_base)
    return found, {"theta 4": theta, "theta 5": theta, "4": five, "5": four, "positions": max(yarn.factor, 1.0)}


def _same(case: str, found: dict, wanted: dict) -> Check:
    missing = object()
    keys = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key, missing) != wanted.get(key, missing)]
    detail = "; ".join(f"{key} is {found.get(key)!r:.80}, not {wanted.get(key)!r:.80}" for key in keys)
    return Check("config", case, len(keys), detail=detail)


def _tensors(shards: Shards, checkpoint: Path, tokenizer: Tokenizer, recipe: Recipe) -> Check:
    """Every tensor of either side, bit by bit."""
    left, wrong = set(shards.headers), []
    count = 0
    for name, tensor in export_state(checkpoint, vocabulary=rows_of(recipe, tokenizer)):
        count += 1
        if name not in left:
            wrong.append(f"{name} is missing")
            continue
        left.remove(name)
        there = shards.read(name)
        if there.shape != tensor.shape or not torch.equal(there, tensor.to(there.dtype)):
            wrong.append(f"{name} differs")
    wrong += [f"{name} is too much" for name in sorted(left)]
    return Check("tensors", f"{count} tensors", len(wrong), detail="; ".join(wrong[:4]))


def first_difference(one: list[int], two: list[int]) -> Optional[int]:
    """Place of the first token that differs, or of the shorter one's end."""
    if one == two:
        return None
    return next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), min(len(one), len(two)))
