"""The small files of an export, beside its weights: what transformers and engines need to load and run it."""

import json
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any, Optional

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import Part, Recipe, geometry_of
from nemo_bluelm.convert.chat_template import chat_template
from nemo_bluelm.convert.hf_config import Flavour, model_config
from nemo_bluelm.convert.native import NATIVE_TOKENS, NATIVE_USE, native_images
from nemo_bluelm.data.tokenizer import SPECIAL_NAMES, Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import (
    METRICS_FILE,
    RECIPE_FILE,
    TOKENIZER_FILE,
    read_metrics,
    resolve_checkpoint,
    step_of,
)

PROCESSORS = ("processing_bluelm_vl", "image_processing_bluelm_vl")
CODE = {Flavour.exact: ("configuration_bluelm_vl", "modeling_bluelm_vl", *PROCESSORS), Flavour.native: PROCESSORS}
MODEL_MAP = {
    "AutoConfig": "configuration_bluelm_vl.BlueLMVLConfig",
    "AutoModel": "modeling_bluelm_vl.BlueLMVLModel",
    "AutoModelForImageTextToText": "modeling_bluelm_vl.BlueLMVLForConditionalGeneration",
}
PROCESSOR_MAP = {"AutoProcessor": "processing_bluelm_vl.BlueLMVLProcessor"}
IMAGE_MAP = {"AutoImageProcessor": "image_processing_bluelm_vl.BlueLMVLImageProcessor"}
_PACKAGES = ("nemo-bluelm", "nemo-toolkit", "megatron-core", "torch")
_LONGEST_LINE = 12  # checkpoints that a card follows back


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """As ``config.json`` and ``generation_config.json`` have them."""
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}


def export_config(
    recipe: Recipe, parts: Collection[Part], tokenizer: Tokenizer, flavour: Flavour = Flavour.exact
) -> dict[str, Any]:
    """``config.json`` but for the weights' dtype and whose code it is."""
    rows = rows_of(recipe, tokenizer) if Part.language in parts else recipe.model.language.vocab_size
    config = model_config(recipe.model, parts, rows, flavour)
    ids = token_ids(tokenizer)
    config["text_config"] |= {name: ids[name] for name in ("bos_token_id", "eos_token_id")}
    return {**config, "image_token_id": tokenizer.image, **ids}


def rows_of(recipe: Recipe, tokenizer: Tokenizer) -> int:
    """Of an export's embedding: without those that only pad it."""
    return min(tokenizer.vocab_size, recipe.model.language.vocab_size)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_code(folder: Path, flavour: Flavour) -> None:
    """The Python files that ``auto_map`` names; of the native flavour the processor's alone."""
    for name in CODE[flavour]:
        source = files("nemo_bluelm.convert.hf") / f"{name}.py"
        (folder / f"{name}.py").write_bytes(source.read_bytes())


def write_tokenizer(folder: Path, tokenizer: Tokenizer, recipe: Recipe, flavour: Flavour) -> None:
    """tokenizer.json as it is, its config, the chat template and the generation's defaults."""
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.content)
    extra = {f"{name}_token": token for name, token in SPECIAL_NAMES.items() if name not in ("pad", "bos", "eos")}
    if flavour is Flavour.native:
        extra |= NATIVE_TOKENS
    yarn = recipe.model.language.yarn
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_NAMES["bos"],
            "eos_token": SPECIAL_NAMES["eos"],
            "pad_token": SPECIAL_NAMES["pad"],
            "extra_special_tokens": extra,
            "clean_up_tokenization_spaces": False,
            "model_max_length": round(yarn.original_max_position_embeddings * yarn.factor),
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )
    (folder / "chat_template.jinja").write_text(chat_template(recipe.data.chat.control_token))
    write_json(folder / "generation_config.json", {"do_sample": False, **token_ids(tokenizer)})


def image_config(recipe: Recipe, flavour: Flavour) -> dict[str, Any]:
    """``preprocessor_config.json``. A native folder's serves two classes: ours with trust_remote_code, or theirs."""
    kind = {"processor_class": "BlueLMVLProcessor", "image_processor_type": "BlueLMVLImageProcessor"}
    if flavour is Flavour.native:
        kind = native_images(geometry_of(recipe.model))
    return {"auto_map": {**IMAGE_MAP, **PROCESSOR_MAP}, **kind, **vars(recipe.model.geometry)}


def write_processors(folder: Path, recipe: Recipe, flavour: Flavour) -> None:
    """preprocessor_config.json and processor_config.json."""
    images = image_config(recipe, flavour)
    write_json(folder / "preprocessor_config.json", images)
    processor = {"auto_map": PROCESSOR_MAP, "processor_class": images["processor_class"]}
    write_json(folder / "processor_config.json", processor)


def write_card(folder: Path, checkpoint: Path, recipe: Recipe, whole: bool, flavour: Flavour) -> None:
    """README.md: where the weights are from, and how to use them."""
    step = _step(checkpoint)
    trained = f"recipe `{recipe.name}`" + (f", {step:,} optimizer steps" if step is not None else "")
    rows = [f"| {source} | {tokens:,} |" for source, tokens in _tokens(checkpoint, step).items()]
    lines = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", "---", f"# {recipe.name}", ""]
    language = "Qwen3" if recipe.model.language.qk_layernorm else "Llama"
    lines += [f"A BlueLM-2.5 model (SigLIP2, 2x2 fold and MLP, {language}), exported by nemo-bluelm.", ""]
    lines += ["## Training", ""]
    lines += [f"- {trained}", *(f"- before it: {line}" for line in _lineage(recipe))]
    lines += [f"- {name} {found}" for name in _PACKAGES if (found := _version(name))]
    if rows:
        lines += ["", "| source | tokens of the last recipe |", "|---|---|", *rows]
    if whole:
        lines += ["", "## Use", "", NATIVE_USE if flavour is Flavour.native else _USE]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


_USE = """\
```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(DIR, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(DIR, trust_remote_code=True)
query = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
text = processor.apply_chat_template(query, enable_thinking=True)
inputs = processor(images=[Image.open("image.jpg")], text=text, return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=256)[0]))
```

`enable_thinking=True` asks for a thought; without it there is usually none. The template writes special tokens as text:
strip `<s>`, `[|Human|]:`, `<image>` and the like from what strangers type."""


def _step(checkpoint: Path) -> Optional[int]:
    try:
        return step_of(checkpoint)
    except ValueError:
        return None


def _tokens(checkpoint: Path, step: Optional[int]) -> dict[str, int]:
    """By source, up to the checkpoint; empty where the run's metrics aren't beside it."""
    if step is None or not (checkpoint.parent.parent / METRICS_FILE).is_file():
        return {}
    try:
        rows = read_metrics(checkpoint.parent.parent)
    except UserError:
        return {}
    return next((row.get("tokens_by_source") or {} for row in reversed(rows) if row["step"] == step), {})


def _lineage(recipe: Recipe) -> list[str]:
    """What the weights started from, newest first, as far as the checkpoints are still there. Names, no paths."""
    lines: list[str] = []
    while len(lines) < _LONGEST_LINE and recipe.init_from:
        try:
            checkpoint = resolve_checkpoint(recipe.init_from, "init_from")
            recipe = load_recipe(str(checkpoint / RECIPE_FILE), [])
        except UserError:
            return [*lines, f"`{Path(recipe.init_from).name}`"]
        step = _step(checkpoint)
        lines.append(f"recipe `{recipe.name}`" + (f", {step:,} steps" if step is not None else ""))
    return lines


def _version(package: str) -> Optional[str]:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
