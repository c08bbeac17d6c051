"""``config.json`` of Hugging Face's models and our model's shapes, in both directions. Weights are in ``table``."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_bluelm.config.schema import (
    Activation,
    LanguageConfig,
    ModelConfig,
    Part,
    ProjectorConfig,
    VisionConfig,
    YarnConfig,
    geometry_of,
    projector_width,
)
from nemo_bluelm.convert.table import EXPORT, LLAMA, SIGLIP
from nemo_bluelm.errors import UserError


class Flavour(str, Enum):
    """Whose code runs an export."""

    exact = "exact"  # its own, in the folder
    native = "native"  # transformers' Cohere2Vision


ARCHITECTURES = {
    Flavour.exact: "BlueLMVLForConditionalGeneration",
    Flavour.native: "Cohere2VisionForConditionalGeneration",
}
MODEL_TYPES = {"bluelm_vl": Flavour.exact, "cohere2_vision": Flavour.native}
_LANGUAGE_TYPES = ("llama", "mistral", "qwen3")
# Why a language model can't be one of ours.
_REFUSED = {
    "qwen2": "its attention has biases, and ours has none",
    "siglip2": "its patches are linear and of any aspect ratio (NaFlex); import a fixed-resolution SigLIP2",
}


@dataclass(frozen=True)
class Source:
    """What a folder's ``config.json`` says.

    Attributes:
        layout: prefix of the names of each part that is there.
        ignored: beginnings of names of weights that our model has no use for, and why.
        padded: rows that the vocabulary had before its export.
    """

    model: ModelConfig
    layout: Mapping[Part, str]
    ignored: Mapping[str, str]
    padded: int = 0


def understand(config: dict[str, Any], path: Path, base: ModelConfig) -> Source:
    """
    Args:
        config: content of ``path``.
        base: the shapes of what the folder does not have.

    Raises:
        UserError: another architecture, or one of these with something that our model lacks.
    """
    source = _understand(config, path, base)
    vision, language = source.model.vision, source.model.language
    try:
        OmegaConf.structured(source.model)
        if vision.hidden_size % vision.num_attention_heads or language.num_attention_heads % language.num_query_groups:
            raise ValueError("heads don't divide")
        geometry_of(source.model)
    except (OmegaConfBaseException, ValueError, ArithmeticError) as error:
        raise UserError(f"{path} has sizes that no model has ({error}); mend it or fetch it again") from error
    return source


def _understand(config: dict[str, Any], path: Path, base: ModelConfig) -> Source:
    kind = config.get("model_type")
    if kind in _LANGUAGE_TYPES:
        model, tied = _language(config, path, base)
        return Source(model, LLAMA, _ROTARY | tied)
    if kind in ("siglip", "siglip_vision_model"):
        vision = config.get("vision_config", {}) if kind == "siglip" else config
        return Source(_vision(vision, path, base), SIGLIP, _NOT_VISION)
    if kind in MODEL_TYPES:
        model = _vision(_section(config, "vision_config", path), path, base)
        model, tied = _language(_section(config, "text_config", path), path, model)
        try:
            model = replace(model, geometry=replace(model.geometry, **_section(config, "geometry", path)))
            projector = dict(config.get("projector") or vars(ProjectorConfig()))  # the default isn't written
            projector["activation"] = Activation(projector["activation"])
            model = replace(model, projector=ProjectorConfig(**projector))
            parts = [Part(name) for name in config["parts"]]
            padded = int(config.get("padded_vocab_size") or 0)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} has no usable geometry, projector or parts ({error}); export the model again"
            ) from error
        return Source(model, {part: EXPORT[part] for part in parts}, tied, padded)
    if kind in _REFUSED:
        raise UserError(f"{path} is of a {kind} model: {_REFUSED[kind]}; import another model")
    known = ", ".join((*_LANGUAGE_TYPES, "siglip", "siglip_vision_model", *MODEL_TYPES))
    raise UserError(f"{path} has model_type {kind!r}, which can't be imported; import one of {known}")


_ROTARY = {"model.rotary_emb.": "computed"}
_NOT_VISION = {
    "text_model.": "text tower",
    "logit_scale": "text tower",
    "logit_bias": "text tower",
    "vision_model.head.": "pooling head",
    "head.": "pooling head",
    "vision_model.embeddings.position_ids": "computed",
}


def model_config(model: ModelConfig, parts: Collection[Part], vocabulary: int, flavour: Flavour) -> dict[str, Any]:
    """``config.json`` of our own export: the parts that it has, their own configs, how tiles are cut and folded.

    Args:
        vocabulary: rows of the embedding that it has; an import grows them to the model's.
    """
    geometry = {name: value for name, value in vars(model.geometry).items() if name not in ("tile", "patch")}
    projector = {**vars(model.projector), "activation": model.projector.activation.value}
    return {
        "architectures": [ARCHITECTURES[flavour]],
        "model_type": next(name for name, kind in MODEL_TYPES.items() if kind is flavour),
        "tie_word_embeddings": model.language.share_embeddings_and_output_weights,
        "parts": [part.value for part in Part if part in parts],
        "text_config": {**language_config(model.language), "vocab_size": vocabulary},
        "vision_config": vision_config(model),
        "geometry": geometry,
        **({} if model.projector == ProjectorConfig() else {"projector": projector}),
        "padded_vocab_size": model.language.vocab_size,
        "downsample_factor": model.geometry.merge,
        "alignment_intermediate_size": projector_width(model),
    }


def vision_config(model: ModelConfig) -> dict[str, Any]:
    """``SiglipVisionConfig``'s arguments."""
    vision = model.vision
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": model.geometry.tile,
        "patch_size": model.geometry.patch,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": vision.layernorm_epsilon,
        "vision_use_head": False,
    }


def language_config(language: LanguageConfig) -> dict[str, Any]:
    """Arguments of ``LlamaConfig``, or ``Qwen3Config`` where queries and keys are normed.

    RoPE is in transformers 4's style and in 5's, as each reads its own alone.
    """
    yarn, rope = language.yarn, {"rope_type": "default"}
    if yarn.factor > 1:
        rope = {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            # Engines read neither well: they are written only where they change something.
            **({"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim} if yarn.mscale_all_dim else {}),
        }
        if not yarn.mscale_all_dim and yarn.mscale != 1:
            from nemo_bluelm.model.config import yarn_attention_scale

            rope["attention_factor"] = yarn_attention_scale(yarn)
    theta = float(language.rotary_base)
    return {
        "architectures": ["Qwen3ForCausalLM" if language.qk_layernorm else "LlamaForCausalLM"],
        "model_type": "qwen3" if language.qk_layernorm else "llama",
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_query_groups,
        "head_dim": language.kv_channels,
        "hidden_act": "silu",
        "rms_norm_eps": language.layernorm_epsilon,
        "tie_word_embeddings": language.share_embeddings_and_output_weights,
        "max_position_embeddings": round(yarn.original_max_position_embeddings * yarn.factor),
        "attention_bias": False,
        **({} if language.qk_layernorm else {"mlp_bias": False}),
        "rope_theta": theta,
        "rope_scaling": rope if yarn.factor > 1 else None,
        "rope_parameters": {"rope_theta": theta, **rope},
    }


def _vision(config: dict[str, Any], path: Path, base: ModelConfig) -> ModelConfig:
    from transformers import SiglipVisionConfig

    parsed = _parse(SiglipVisionConfig, config, path)
    _demand(path, hidden_act=(parsed.hidden_act, "gelu_pytorch_tanh"), num_channels=(parsed.num_channels, 3))
    side = parsed.image_size // parsed.patch_size
    vision = VisionConfig(
        num_layers=parsed.num_hidden_layers,
        hidden_size=parsed.hidden_size,
        ffn_hidden_size=parsed.intermediate_size,
        num_attention_heads=parsed.num_attention_heads,
        layernorm_epsilon=parsed.layer_norm_eps,
    )
    # 384 px are 27 patches of 14 px and 6 px that its convolution leaves out; our tiles end with a patch.
    geometry = replace(base.geometry, tile=side * parsed.patch_size, patch=parsed.patch_size)
    return replace(base, vision=vision, geometry=geometry)


def _language(config: dict[str, Any], path: Path, base: ModelConfig) -> tuple[ModelConfig, dict[str, str]]:
    """The model, and the head's name where it is the embedding."""
    from transformers import LlamaConfig, Qwen3Config

    qk_layernorm = config.get("model_type") == "qwen3"
    parsed = _parse(Qwen3Config if qk_layernorm else LlamaConfig, config, path)
    _demand(
        path,
        hidden_act=(parsed.hidden_act, "silu"),
        attention_bias=(parsed.attention_bias, False),
        mlp_bias=(config.get("mlp_bias", False), False),
        sliding_window=(parsed.sliding_window if qk_layernorm else config.get("sliding_window"), None),
        partial_rotary_factor=(config.get("partial_rotary_factor", 1.0), 1.0),
    )
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if not isinstance(theta, (int, float)) or theta != int(theta):
        raise UserError(f"{path} has rope_theta {theta}, and model.language.rotary_base is a whole number")
    tied = bool(parsed.tie_word_embeddings)
    language = LanguageConfig(
        num_layers=parsed.num_hidden_layers,
        hidden_size=parsed.hidden_size,
        ffn_hidden_size=parsed.intermediate_size,
        num_attention_heads=parsed.num_attention_heads,
        num_query_groups=parsed.num_key_value_heads,
        kv_channels=parsed.head_dim,
        vocab_size=parsed.vocab_size,
        layernorm_epsilon=parsed.rms_norm_eps,
        qk_layernorm=qk_layernorm,
        rotary_base=int(theta),
        share_embeddings_and_output_weights=tied,
        init_method_std=base.language.init_method_std,
        yarn=_yarn(rope, parsed.max_position_embeddings, path),
    )
    return replace(base, language=language), {"lm_head.weight": "tied to the embedding"} if tied else {}


def _yarn(rope: dict[str, Any], longest: int, path: Path) -> YarnConfig:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return YarnConfig(original_max_position_embeddings=longest)
    if kind != "yarn":
        raise UserError(f"{path} has rope_type {kind!r}; our RoPE is plain or YaRN's, import another model")
    if not rope.get("truncate", True):
        raise UserError(f"{path} has rope_scaling.truncate false, and our YaRN rounds; import another model")
    if "factor" not in rope:
        raise UserError(f"{path} has rope_scaling without factor; add it")
    original = rope.get("original_max_position_embeddings") or longest
    mscale, all_dim = 1.0, 0.0
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        mscale, all_dim = float(rope["mscale"]), float(rope["mscale_all_dim"])
    factor, given = float(rope["factor"]), rope.get("attention_factor")
    if given is not None and factor > 1:
        mscale, all_dim = (given - 1) / (0.1 * math.log(factor)), 0.0
    return YarnConfig(factor, original, rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0, mscale, all_dim)


def _parse(kind: type, config: dict[str, Any], path: Path):
    try:
        return kind(**{key: value for key, value in config.items() if key != "model_type"})
    except Exception as error:  # transformers raises many kinds for values of a wrong type or range
        raise UserError(f"{path} is no {kind.__name__} ({error}); mend it or fetch it again") from error


def _demand(path: Path, **found: tuple[Any, Any]) -> None:
    """Refuse values that our model does not have: key = (found, demanded)."""
    for key, (value, demanded) in found.items():
        if value != demanded:
            raise UserError(f"{path} has {key} {value!r}, our model is built with {demanded!r}; use another model")


def _section(config: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    if not isinstance(config.get(name), dict):
        raise UserError(f"{path} lacks {name}; export the model again")
    return config[name]
