"""BlueLM-2.5 of TensorRT-LLM's own SigLIP and Llama or Qwen3, with the projector between them."""

import copy
import dataclasses
import inspect

import torch
from tensorrt_llm._torch.models.modeling_auto import AutoModelForCausalLM
from tensorrt_llm._torch.models.modeling_multimodal_utils import (
    find_input_mm_embeds,
    fuse_input_embeds,
    get_multimodal_embeddings,
)
from tensorrt_llm._torch.models.modeling_siglip import SiglipVisionModel
from tensorrt_llm._torch.models.modeling_utils import register_auto_model
from tensorrt_llm.inputs import (
    MultimodalPlaceholderMetadata,
    MultimodalPlaceholderPlacement,
    register_input_processor,
)
from transformers import PreTrainedModel

from .parts import Projector, check_rope, language_quantization, split_weights
from .processing_bluelm_trtllm import BlueLMVLInputProcessor

ARCHITECTURE, MODEL_TYPE, IMAGE = "BlueLMVLForConditionalGeneration", "bluelm_vl", "<image>"
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _placeholders():
    options = {
        "placeholder_map": {"image": IMAGE},
        "placeholder_placement": MultimodalPlaceholderPlacement.BEFORE_TEXT,
        "placeholders_separator": "",  # training has nothing between an image and the text behind it
    }
    if "content_format" in {field.name for field in dataclasses.fields(MultimodalPlaceholderMetadata)}:
        from tensorrt_llm.inputs import ContentFormat

        options["content_format"] = ContentFormat.OPENAI
    return MultimodalPlaceholderMetadata(**options)


@register_auto_model(ARCHITECTURE)
@register_input_processor(BlueLMVLInputProcessor, model_type=MODEL_TYPE, placeholder_metadata=_placeholders())
class BlueLMVLModel(PreTrainedModel):
    def __init__(self, model_config):
        config = model_config.pretrained_config
        super().__init__(config)
        check_rope(config.text_config)
        self.model_config = copy.copy(model_config)
        self.dtype_of_weights = _dtype(config)
        self.image_tokens = torch.tensor([config.image_token_id], dtype=torch.int32, device=_DEVICE)
        self.llm = AutoModelForCausalLM.from_config(
            _part(model_config, config.text_config, language_quantization(model_config.quant_config))
        )
        # The ViT is never quantised: its 4304 columns don't divide into blocks.
        self.vision_tower = SiglipVisionModel(_part(model_config, config.vision_config, None), use_post_layernorm=True)
        self.projector = Projector(
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
            config.downsample_factor,
            self.dtype_of_weights,
            **(getattr(config, "projector", None) or {}),
        ).to(_DEVICE)
        # The engine sizes its cache by the language model.
        self.config = self.llm.config
        self.model_config.pretrained_config = self.llm.config
        self.is_loaded = True

    def load_weights(self, weights, weight_mapper=None):
        vision, projector, language = split_weights(weights)
        takes_mapper = "weight_mapper" in inspect.signature(self.llm.load_weights).parameters
        if takes_mapper and weight_mapper is not None:
            self.llm.load_weights(language, weight_mapper)
        else:
            self.llm.load_weights(language)
        self.vision_tower.load_weights(vision)
        self.projector.load_state_dict({name: tensor[:] for name, tensor in projector.items()})

    def infer_max_seq_len(self):
        return self.llm.infer_max_seq_len()

    @property
    def mm_token_ids(self):
        return self.image_tokens

    @torch.inference_mode()
    def forward(
        self,
        attn_metadata,
        input_ids=None,
        position_ids=None,
        inputs_embeds=None,
        return_context_logits=False,
        **kwargs,
    ):
        params = kwargs.get("multimodal_params", [])[: attn_metadata.num_contexts]
        embeds = []
        if params:
            embeds = get_multimodal_embeddings(encoder_forward_fn=self._encode, multimodal_params=params)
            embeds = find_input_mm_embeds(embeds, params)
        fused = {key: kwargs[key] for key in ("text_token_indices", "mm_token_indices") if key in kwargs}
        input_ids, inputs_embeds = fuse_input_embeds(
            self.llm.model.embed_tokens, input_ids, embeds, mm_token_ids=self.image_tokens, **fused
        )
        return self.llm.forward(
            attn_metadata=attn_metadata,
            input_ids=input_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_context_logits=return_context_logits,
            lora_params=kwargs.get("lora_params"),
        )

    def _encode(self, params):
        """Visual tokens of all requests: [[tokens, hidden]]."""
        pixels = torch.cat([param.multimodal_data["image"]["pixel_values"] for param in params])
        pixels = pixels.to(self.image_tokens.device, self.dtype_of_weights)
        metadata = self.vision_tower.prepare_attn_metadata(len(pixels))
        features = self.vision_tower(pixels, attn_metadata=metadata)[-1]
        features = features.reshape(len(pixels), -1, features.size(-1))
        return [self.projector(features).flatten(0, 1)]


def _part(model_config, config, quantization):
    """The engine's config of one part of the model."""
    part = dataclasses.replace(model_config, pretrained_config=config, quant_config=quantization)
    if getattr(config, "torch_dtype", None) is None:
        config.torch_dtype = _dtype(model_config.pretrained_config)
    return part


def _dtype(config):
    kind = getattr(config, "torch_dtype", None) or getattr(config, "dtype", None) or torch.bfloat16
    return getattr(torch, kind) if isinstance(kind, str) else kind
