"""Exports with the language model's linears in FP8 or INT4, calibrated by NVIDIA's ModelOpt."""

import contextlib
import copy
import sys
import warnings
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor, nn

from nemo_bluelm.atomic import new_folder
from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import LanguageConfig
from nemo_bluelm.convert.exporting import export_hf
from nemo_bluelm.convert.hf_files import write_json
from nemo_bluelm.convert.shards import WEIGHTS, read_json
from nemo_bluelm.data.chat import encode_prompt
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE

GROUP = 128  # weights that share a scale
QUANT_FILE = "hf_quant_config.json"
# ModelOpt 0.37 neither leaves these out by itself nor names them as they are. Engines ask with and without `model.`.
EXCLUDED = ("model.vision_tower*", "model.multi_modal_projector*", "vision_tower*", "multi_modal_projector*", "lm_head")


class Kind(str, Enum):
    """Of weights: FP8 with FP8 activations, or four bits in groups of 128 with BF16 activations."""

    fp8 = "fp8"
    int4_awq = "int4_awq"


@dataclass(frozen=True)
class Quantised:
    """What came of it.

    Attributes:
        before: bytes of the weights in BF16.
        after: bytes of the weights in the folder.
        error: largest difference of logits with ModelOpt's simulation, activations too, as a share of the largest one.
        stored: the same of the folder's weights, dequantised, with activations as they were.
    """

    before: int
    after: int
    error: float
    stored: float


def quantise(checkpoint: Path, out: Path, kind: Kind, calibration: Path) -> Quantised:
    """Write :func:`export_hf`'s folder in BF16 with quantised linears; vision tower, projector and head stay BF16.

    Holds the whole model in memory, three times at the end. transformers can't run the folder; :func:`dequantised` can.

    Args:
        calibration: text, a prompt a line.

    Raises:
        UserError: as :func:`export_hf`; ModelOpt isn't installed; there are no prompts; sizes that INT4 can't take.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import modelopt.torch.quantization as mtq
            from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
            from modelopt.torch.export.unified_export_hf import _export_hf_checkpoint
    except ImportError as error:
        raise UserError("quantising needs nvidia-modelopt; pip install 'nemo-bluelm[export]'") from error
    from safetensors.torch import save

    if kind is Kind.int4_awq:
        _check_groups(load_recipe(str(checkpoint / RECIPE_FILE), []).model.language)
    prompts = _prompts(checkpoint, calibration)
    settings = copy.deepcopy({Kind.fp8: mtq.FP8_DEFAULT_CFG, Kind.int4_awq: mtq.INT4_AWQ_CFG}[kind])
    for name in ("*vision_tower*", "*multi_modal_projector*", "*lm_head*"):
        settings["quant_cfg"][name] = {"enable": False}
    with new_folder(out) as folder, torch.inference_mode(False), torch.no_grad():
        before = export_hf(checkpoint, folder, dtype=torch.bfloat16, shard_bytes=2**62).size
        model = _load(folder)
        wanted = _logits(model, prompts)
        with contextlib.redirect_stdout(sys.stderr):  # it tells of its progress
            model = mtq.quantize(model, settings, lambda given: _logits(given, prompts))
        error = _error(wanted, _logits(model, prompts))
        state, found = _export_hf_checkpoint(model.to(torch.bfloat16), torch.bfloat16)[:2]
        if "lm_head.weight" in state and model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        found["quantization"]["exclude_modules"] = list(EXCLUDED)
        content = save({name: value.contiguous() for name, value in state.items()}, {"format": "pt"})
        (folder / WEIGHTS).write_bytes(content)
        write_json(folder / QUANT_FILE, found)
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", {**config, "quantization_config": convert_hf_quant_config_format(found)})
        del model
        stored = _error(wanted, _logits(dequantised(folder), prompts))
        after = sum(tensor.nbytes for tensor in state.values())
    return Quantised(before, after, error, stored)


def _check_groups(language: LanguageConfig) -> None:
    inputs = {
        "hidden_size": language.hidden_size,
        "ffn_hidden_size": language.ffn_hidden_size,
        "num_attention_heads * kv_channels": language.num_attention_heads * language.kv_channels,
    }
    for name, size in inputs.items():
        if size % GROUP:
            raise UserError(
                f"model.language.{name} is {size}, and INT4 takes groups of {GROUP} inputs of a linear; "
                "use --quantise fp8"
            )


def dequantised(folder: Path) -> nn.Module:
    """The folder's model in FP32 with what its weights stand for. Runs the folder's code."""
    from safetensors.torch import load_file

    state, whole = load_file(folder / WEIGHTS), {}
    for name, tensor in state.items():
        base, _, end = name.rpartition(".")
        if end in ("weight_scale", "input_scale", "pre_quant_scale"):
            continue
        scale = state.get(f"{base}.weight_scale")
        if end == "weight" and scale is not None:
            if tensor.dtype is torch.uint8:  # rows 2n and 2n + 1 in the lower and upper four bits
                bits = torch.stack([tensor & 15, tensor >> 4], 1).flatten(0, 1).to(torch.int8)
                tensor = torch.where(bits > 7, bits - 16, bits)
                scale = scale.repeat_interleave(tensor.size(1) // scale.size(1), 1)
            tensor = tensor.float() * scale.float()
            tensor = tensor * state.get(f"{base}.pre_quant_scale", torch.ones(())).float()
        whole[name] = tensor.float()
    return _load(folder, whole)


def _load(folder: Path, state: dict[str, Tensor] | None = None) -> nn.Module:
    from transformers import AutoConfig, AutoModelForImageTextToText

    if state is None:
        return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    del config.quantization_config
    model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise UserError(f"{folder} lacks {missing} or has {unexpected}; quantise the model again")
    model.tie_weights()
    return model.eval()


def _prompts(checkpoint: Path, path: Path) -> list[Tensor]:
    recipe, tokenizer = load_recipe(str(checkpoint / RECIPE_FILE), []), Tokenizer.load(checkpoint / TOKENIZER_FILE)
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}); --calibration takes text, a prompt a line") from error
    if not lines:
        raise UserError(f"{path} has no prompts; write one a line")
    control = recipe.data.chat.control_token
    messages = ([{"role": "user", "content": line}] for line in lines)
    return [torch.tensor([encode_prompt(message, tokenizer, [], True, control)]) for message in messages]


def _logits(model: nn.Module, prompts: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0].float() for tokens in prompts]


def _error(wanted: list[Tensor], found: list[Tensor]) -> float:
    largest = max(logits.abs().max().item() for logits in wanted)
    return max((one - two).abs().max().item() for one, two in zip(wanted, found)) / largest
