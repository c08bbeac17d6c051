"""Prompts and images to the model's inputs, for TensorRT-LLM 1.2 and later."""

import torch
from tensorrt_llm.inputs import BaseMultimodalDummyInputsBuilder, BaseMultimodalInputProcessor
from transformers import AutoProcessor

from .parts import picture, size


class BlueLMVLInputProcessor(BaseMultimodalInputProcessor, BaseMultimodalDummyInputsBuilder):
    """Runs the folder's own processor.

    Args:
        model_path: of the folder.
        config: its ``config.json``, parsed.
        tokenizer: None takes the folder's.
    """

    def __init__(self, model_path, config, tokenizer, trust_remote_code=True, **kwargs):
        super().__init__(
            model_path=model_path, config=config, tokenizer=tokenizer, trust_remote_code=trust_remote_code, **kwargs
        )
        self._path, self._config = model_path, config
        self._processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        self._tokenizer = tokenizer if tokenizer is not None else self._processor.tokenizer
        kind = getattr(config, "torch_dtype", None) or getattr(config, "dtype", None) or torch.bfloat16
        self._dtype = getattr(torch, kind) if isinstance(kind, str) else kind

    @property
    def processor(self):
        return self._processor

    @property
    def tokenizer(self):
        return self._tokenizer

    @property
    def config(self):
        return self._config

    @property
    def dtype(self):
        return self._dtype

    @property
    def model_path(self):
        return self._path

    def get_vocab_size(self):
        return self._config.text_config.vocab_size

    def get_mm_token_ids(self):
        """An image's span is its placeholders; what stands around them is ordinary text with rows of its own."""
        return torch.tensor([self._config.image_token_id], dtype=torch.int32)

    def get_mm_special_token_ids(self):
        return None

    def get_num_tokens_per_image(self, *, image, **kwargs):
        return self._processor._get_num_multimodal_tokens([size(image)])["num_image_tokens"][0]

    @torch.inference_mode()
    def call_with_text_prompt(self, inputs, sampling_params):
        """
        Returns:
            Token ids, and ``{"multimodal_data": {"image": {"pixel_values", "num_patches"}}}``: tiles of all images
            [n, 3, tile, tile], tiles of each; None without images.
        """
        media = inputs.get("multi_modal_data") or {}
        unknown = [kind for kind in media if kind != "image"]
        if unknown:
            raise ValueError(f"a BlueLM-2.5 model reads images, not {unknown[0]}")
        images = media.get("image")
        images = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
        pictures = [picture(image) for image in images]
        made = self._processor(images=pictures or None, text=inputs["prompt"])
        tokens = made["input_ids"][0]
        if not pictures:
            return list(tokens), None
        sizes = [(image.height, image.width) for image in pictures]
        counts = self._processor._get_num_multimodal_tokens(sizes)["num_image_patches"]
        pixels = torch.as_tensor(made["pixel_values"]).to(self._dtype)
        return list(tokens), {"multimodal_data": {"image": {"pixel_values": pixels, "num_patches": counts}}}

    if not hasattr(BaseMultimodalInputProcessor, "call_with_text_prompt"):  # 1.2
        __call__ = call_with_text_prompt
