"""Prompts and images to the model's inputs."""

import re

import numpy as np
from transformers import AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from .image_processing_bluelm_vl import BlueLMVLImageProcessor

# Training encodes a query and the line break behind it one by one; together they might be other tokens.
_REPLY = re.compile(r"(?=\n\[\|AI\|\]:)")


class BlueLMVLProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": False, "return_mm_token_type_ids": False}}


class BlueLMVLProcessor(ProcessorMixin):
    """``<image>`` in a text becomes ``<im_start>``, an ``<image>`` for every visual token, ``<im_end>``."""

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self.boi_token, self.eoi_token = "<image>", "<im_start>", "<im_end>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.image_ids = [self.image_token_id]

    @classmethod
    def _get_arguments_from_pretrained(cls, folder, *args, **kwargs) -> list:
        # AutoImageProcessor of transformers 5 asks for torchvision, which this one has no use for.
        return [
            BlueLMVLImageProcessor.from_pretrained(folder, **kwargs),
            AutoTokenizer.from_pretrained(folder, **kwargs),
        ]

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        """
        Args:
            images: of all texts in order.
            text: one, or a list of them; the chat template has written its special tokens.

        Returns:
            ``input_ids``, ``attention_mask``, ``pixel_values`` if there are images, ``mm_token_type_ids`` and
            ``text_replacement_offsets`` (what each placeholder became, by which vLLM finds the images) if asked for.
        """
        if text is None:
            raise ValueError("give a text")
        texts = [text] if isinstance(text, str) else list(text)
        wants_offsets = kwargs.pop("return_text_replacement_offsets", False)
        merged = self._merge_kwargs(BlueLMVLProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        options, pixels, counts = merged["text_kwargs"], {}, []
        if images is not None and not (isinstance(images, (list, tuple)) and not any(_some(images))):
            pixels = self.image_processor(images)
            counts = pixels.pop("num_patches")
        found = sum(one.count(self.image_token) for one in texts)
        if found != len(counts):
            raise ValueError(f"the texts have {found} {self.image_token} and {len(counts)} images are given")
        tiles = iter(counts)
        expanded = [self._expand(one, tiles) for one in texts]
        inputs = {"input_ids": [self._encode(one) for one, _ in expanded]}
        padding = options.get("padding") or False
        side = {"padding_side": options["padding_side"]} if options.get("padding_side") else {}
        inputs = self.tokenizer.pad(
            inputs, padding=padding, max_length=options.get("max_length"), return_attention_mask=True, **side
        ).data
        if options.get("return_mm_token_type_ids"):
            inputs["mm_token_type_ids"] = [
                np.isin(np.array(ids), self.image_ids).astype(int).tolist() for ids in inputs["input_ids"]
            ]
        made = BatchFeature({**inputs, **pixels}, tensor_type=options.get("return_tensors"))
        if wants_offsets:
            made["text_replacement_offsets"] = [offsets for _, offsets in expanded]
        return made

    def _expand(self, text: str, tiles) -> tuple:
        """The text with its placeholders, and what each image's became: as transformers 5 describes it."""
        offsets, grown = [], 0

        def image(match) -> str:
            nonlocal grown
            count = next(tiles) * self.image_processor.tokens_per_tile
            whole = self.boi_token + self.image_token * count + self.eoi_token
            start, end = match.span()
            new = (start + grown, start + grown + len(whole))
            offsets.append(
                {"type": "image", "span": (start, end), "new_span": new, "text": match[0], "replacement": whole}
            )
            grown += len(whole) - (end - start)
            return whole

        return re.sub(re.escape(self.image_token), image, text), offsets

    def _encode(self, text: str) -> list:
        pieces = self.tokenizer(_REPLY.split(text), add_special_tokens=False)["input_ids"]
        return [token for piece in pieces for token in piece]

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Of images of these (height, width): placeholders, and tiles."""
        if image_sizes is None:
            return MultiModalData()
        tiles = [self.image_processor.get_number_of_image_patches(height, width) for height, width in image_sizes]
        tokens = [count * self.image_processor.tokens_per_tile for count in tiles]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=tiles)

    @property
    def model_input_names(self) -> list:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]


def _some(images):
    for image in images:
        yield from _some(image) if isinstance(image, (list, tuple)) else (True,)
