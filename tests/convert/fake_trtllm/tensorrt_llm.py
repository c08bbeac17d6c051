"""A stand-in for TensorRT-LLM with the interfaces of 1.2 (FAKE_TRTLLM=1.2) or of main: it records registrations.

Its modules are computed by transformers where the real ones compute; weights are demanded in full.
"""

import enum
import json
import os
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Optional

import torch
from transformers import LlamaForCausalLM, SiglipVisionModel

MAIN = os.environ.get("FAKE_TRTLLM", "main") == "main"
REGISTERED = SimpleNamespace(models={}, processors={}, placeholders={})
__path__ = []


def _module(name: str, **content) -> None:
    module = sys.modules[f"{__name__}.{name}"] = ModuleType(f"{__name__}.{name}")
    module.__path__ = []
    vars(module).update(content)


class MultimodalPlaceholderPlacement(enum.Enum):
    INVALID = -1
    BEFORE_TEXT = 0
    AFTER_TEXT = 1


class ContentFormat(enum.Enum):
    STRING = "string"
    OPENAI = "openai"


@dataclass(frozen=True)
class _Metadata12:
    placeholder_map: dict = field(default_factory=dict)
    placeholder_placement: MultimodalPlaceholderPlacement = MultimodalPlaceholderPlacement.AFTER_TEXT
    placeholders_separator: str = "\n"


@dataclass(frozen=True)
class _MetadataMain(_Metadata12):
    content_format: Optional[ContentFormat] = None


class _Base(ABC):  # noqa: B024
    def __init__(self, model_path, config, tokenizer, trust_remote_code=True, **kwargs):
        super().__init__(**kwargs)
        self._config, self._model_path, self._tokenizer = config, model_path, tokenizer
        self._trust_remote_code, self._multimodal_hashing_supported = trust_remote_code, None

    processor = property(abstractmethod(lambda self: None))
    tokenizer = property(abstractmethod(lambda self: self._tokenizer))
    config = property(abstractmethod(lambda self: self._config))
    dtype = property(abstractmethod(lambda self: None))


class _Processor12(_Base):
    @abstractmethod
    def __call__(self, inputs, sampling_params): ...


class _ProcessorMain(_Base):
    def __call__(self, inputs, sampling_params):
        return self.call_with_text_prompt(inputs, sampling_params)

    @abstractmethod
    def call_with_text_prompt(self, inputs, sampling_params): ...


class BaseMultimodalDummyInputsBuilder(ABC):  # noqa: B024
    tokenizer = property(abstractmethod(lambda self: None))
    config = property(abstractmethod(lambda self: None))
    model_path = property(abstractmethod(lambda self: None))


def register_auto_model(name):
    def decorate(cls):
        REGISTERED.models[name] = cls
        return cls

    return decorate


def register_input_processor(processor, model_type, placeholder_metadata=None):
    def decorate(cls):
        REGISTERED.processors[cls] = processor
        REGISTERED.placeholders[model_type] = placeholder_metadata
        return cls

    return decorate


@dataclass
class ModelConfig:
    pretrained_config: object = None
    quant_config: object = None
    attn_backend: str = "TRTLLM"


class _Language(torch.nn.Module):
    def __init__(self, model_config):
        super().__init__()
        self.config, self.quant_config = model_config.pretrained_config, model_config.quant_config
        self.inner = LlamaForCausalLM(self.config)
        self.model = self.inner.model

    def load_weights(self, weights, weight_mapper=None):
        tied = {"lm_head.weight": weights["model.embed_tokens.weight"]} if self.config.tie_word_embeddings else {}
        self.inner.load_state_dict({**weights, **tied}, strict=True)

    def infer_max_seq_len(self):
        return self.config.max_position_embeddings

    def forward(self, attn_metadata, input_ids, position_ids, inputs_embeds, return_context_logits, lora_params):
        assert (input_ids is None) != (inputs_embeds is None)
        ids = None if input_ids is None else input_ids[None].long()
        embeds = None if inputs_embeds is None else inputs_embeds[None]
        return self.inner(input_ids=ids, inputs_embeds=embeds, position_ids=position_ids[None]).logits[0]


class AutoModelForCausalLM:
    @staticmethod
    def from_config(model_config):
        assert model_config.pretrained_config.architectures == ["LlamaForCausalLM"]
        return _Language(model_config)


class _Vision(torch.nn.Module):
    """Hidden states of all layers, tokens of all images in one row: [images * patches, channels]."""

    def __init__(self, model_config, use_post_layernorm=False):
        super().__init__()
        assert model_config.quant_config is None and use_post_layernorm
        assert not model_config.pretrained_config.vision_use_head
        self.inner = SiglipVisionModel(model_config.pretrained_config)

    def load_weights(self, weights):
        self.inner.load_state_dict(weights, strict=True)

    def prepare_attn_metadata(self, batch_size):
        return batch_size

    def forward(self, pixel_values, attn_metadata):
        assert attn_metadata == len(pixel_values)
        return (None, self.inner(pixel_values).last_hidden_state.flatten(0, 1))


def get_multimodal_embeddings(encoder_forward_fn, multimodal_params):
    return encoder_forward_fn(multimodal_params)


def find_input_mm_embeds(mm_embeds, multimodal_params):
    return mm_embeds


def fuse_input_embeds(
    embedding_layer, input_ids, mm_embeds, mm_token_ids=None, text_token_indices=None, mm_token_indices=None, **kwargs
):
    if not mm_embeds:
        return input_ids, None
    places = torch.isin(input_ids, mm_token_ids)
    embeds = embedding_layer(input_ids.long())
    embeds[places] = torch.cat(mm_embeds)
    return None, embeds


class SamplingParams:
    def __init__(self, max_tokens, ignore_eos=False, logprobs=None):
        self.max_tokens, self.ignore_eos, self.logprobs = max_tokens, ignore_eos, logprobs


class LLM:
    """Says what the file named by FAKE_TRTLLM_ANSWERS has, one answer after another."""

    def __init__(self, model, trust_remote_code, max_num_tokens):
        assert trust_remote_code and REGISTERED.models
        self._answers = iter(json.loads(Path(os.environ["FAKE_TRTLLM_ANSWERS"]).read_text()))

    def generate(self, inputs, sampling_params):
        answer = next(self._answers)
        steps = [{token: SimpleNamespace(logprob=one)} for token, one in zip(answer["tokens"], answer["logprobs"])]
        output = SimpleNamespace(token_ids=answer["tokens"], logprobs=steps)
        return SimpleNamespace(prompt_token_ids=answer["prompt_tokens"], outputs=[output])


_module(
    "inputs",
    BaseMultimodalDummyInputsBuilder=BaseMultimodalDummyInputsBuilder,
    BaseMultimodalInputProcessor=_ProcessorMain if MAIN else _Processor12,
    MultimodalPlaceholderMetadata=_MetadataMain if MAIN else _Metadata12,
    MultimodalPlaceholderPlacement=MultimodalPlaceholderPlacement,
    register_input_processor=register_input_processor,
    **({"ContentFormat": ContentFormat} if MAIN else {}),
)
_module("_torch")
_module("_torch.models")
_module("_torch.models.modeling_auto", AutoModelForCausalLM=AutoModelForCausalLM)
_module(
    "_torch.models.modeling_multimodal_utils",
    find_input_mm_embeds=find_input_mm_embeds,
    fuse_input_embeds=fuse_input_embeds,
    get_multimodal_embeddings=get_multimodal_embeddings,
)
_module("_torch.models.modeling_siglip", SiglipVisionModel=_Vision)
_module("_torch.models.modeling_utils", register_auto_model=register_auto_model)
