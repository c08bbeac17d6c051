"""Folders for inference engines: an export of :mod:`exporting` and beside it what an engine needs."""

import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Optional

import torch

from nemo_bluelm.atomic import new_folder
from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import Part
from nemo_bluelm.convert.exporting import Exported, Flavour, export_hf
from nemo_bluelm.convert.golden import GOLDEN_FILE, golden
from nemo_bluelm.convert.hf_config import language_config
from nemo_bluelm.convert.hf_files import write_json
from nemo_bluelm.convert.shards import SHARD_BYTES
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, parts_in

TRTLLM_PACKAGE, TRTLLM_SCRIPT = "bluelm_trtllm", "verify_trtllm.py"
_VLLM_FILES = ("bluelm_thinking.py", "VLLM.md")
_UNREAD = ("attention_factor", "truncate")  # of RoPE; TensorRT-LLM passes over them without a word


def export_vllm(
    checkpoint: Path,
    out: Path,
    flavour: Flavour = Flavour.exact,
    dtype: Optional[torch.dtype] = None,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """As :func:`export_hf`, with the thinking budget as a logits processor and the answers to compare vLLM with.

    Raises:
        UserError: as :func:`export_hf`; the checkpoint lacks a part of the model; of the native flavour, whose class
            vLLM has itself, the head has weights of its own.
    """
    _demand_whole(checkpoint)
    language = load_recipe(str(checkpoint / RECIPE_FILE), []).model.language
    if flavour is Flavour.native and not language.share_embeddings_and_output_weights:
        raise UserError(
            "vLLM's own Cohere2Vision needs model.language.share_embeddings_and_output_weights true; take flavour exact"
        )
    with new_folder(out) as folder:
        done = export_hf(checkpoint, folder, flavour, dtype, shard_bytes)
        for name in _VLLM_FILES:
            (folder / name).write_bytes((files("nemo_bluelm.convert.vllm") / name).read_bytes())
        # Cohere2Vision's processor stretches images where ours pads them, if they aren't whole tiles.
        answers = golden(checkpoint, done.vocabulary[1], whole_tiles=flavour is Flavour.native)
        write_json(folder / GOLDEN_FILE, answers)
    return done


def export_trtllm(
    checkpoint: Path,
    out: Path,
    flavour: Flavour = Flavour.exact,
    dtype: Optional[torch.dtype] = None,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """As :func:`export_hf`, with a package that makes TensorRT-LLM know the model, and the answers to compare it with.

    Raises:
        UserError: as :func:`export_hf`; the native flavour; the checkpoint lacks a part of the model; TensorRT-LLM
            can't express its RoPE.
    """
    if flavour is not Flavour.exact:
        raise UserError("export trtllm is of flavour exact, as TensorRT-LLM has no Cohere2Vision; leave --flavour out")
    _demand_whole(checkpoint)
    recipe = load_recipe(str(checkpoint / RECIPE_FILE), [])
    rope = language_config(recipe.model.language)["rope_scaling"] or {}
    for key in _UNREAD:
        if key in rope:
            raise UserError(
                f"TensorRT-LLM doesn't read YaRN's {key}, which model.language.yarn.mscale "
                f"{recipe.model.language.yarn.mscale} needs; export hf or vllm"
            )
    with new_folder(out) as folder:
        done = export_hf(checkpoint, folder, flavour, dtype, shard_bytes)
        with as_file(files("nemo_bluelm.convert.trtllm") / TRTLLM_PACKAGE) as package:
            shutil.copytree(package, folder / TRTLLM_PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / TRTLLM_SCRIPT).write_bytes((files("nemo_bluelm.convert.trtllm") / TRTLLM_SCRIPT).read_bytes())
        write_json(folder / GOLDEN_FILE, golden(checkpoint, done.vocabulary[1]))
    return done


def _demand_whole(checkpoint: Path) -> None:
    for part in Part:
        if part not in parts_in(checkpoint):
            raise UserError(f"{checkpoint} lacks the {part.value} part, and engines run whole models; export hf")
