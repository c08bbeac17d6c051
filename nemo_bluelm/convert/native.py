"""The flavour that transformers' own Cohere2Vision runs: which models it can express, and what its files say."""

from collections.abc import Collection, Iterator
from typing import Any

from nemo_bluelm.config.schema import Activation, ModelConfig, Part, geometry_of
from nemo_bluelm.data.tokenizer import SPECIAL_NAMES
from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry

# Cohere2Vision's processor wants a token behind each tile; we have none, and write nothing there.
NATIVE_TOKENS = {
    "boi_token": SPECIAL_NAMES["im_start"],
    "eoi_token": SPECIAL_NAMES["im_end"],
    "img_line_break_token": "",
}


NATIVE_NOTE = (
    "tiles and prompts were made by the folder's processor; without trust_remote_code Cohere2Vision's own stretches "
    "images over their tiles and may choose other grids"
)


def demand_native(model: ModelConfig, parts: Collection[Part]) -> None:
    """
    Raises:
        UserError: Cohere2Vision computes something else than this model; names every key that would have to change.
    """
    missing = [part.value for part in Part if part not in parts]
    if missing:
        raise UserError(f"flavour native is of whole models, and {' and '.join(missing)} are missing; take exact")
    misfits = list(_misfits(model))
    if misfits:
        raise UserError(
            f"flavour native is transformers' Cohere2Vision, which needs {', '.join(misfits)}; "
            "take exact, or train a model like model=bluelm_2_5_3b_native"
        )


def _misfits(model: ModelConfig) -> Iterator[str]:
    geometry = geometry_of(model)
    if model.projector.layer_norm:
        yield "model.projector.layer_norm false"
    if model.projector.activation is not Activation.swiglu:
        yield f"model.projector.activation swiglu, not {model.projector.activation.value}"
    if geometry.patches_per_side % geometry.merge:
        block = geometry.patch * geometry.merge
        yield f"model.geometry.tile a multiple of {block} (patch * merge, no padding), not {geometry.tile}"
    if not geometry.thumbnail:
        yield "model.geometry.thumbnail true"


def native_images(geometry: Geometry) -> dict[str, Any]:
    """What ``Cohere2VisionImageProcessorFast`` reads of ``preprocessor_config.json``."""
    return {
        "processor_class": "Cohere2VisionProcessor",
        "image_processor_type": "Cohere2VisionImageProcessorFast",
        "size": {"height": geometry.tile, "width": geometry.tile},
        "patch_size": geometry.tokens_per_side,  # its name for visual tokens in a tile's row
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": geometry.max_cols * geometry.max_rows,
        "do_resize": True,
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,  # bicubic
    }


NATIVE_USE = """\
```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(DIR)
processor = AutoProcessor.from_pretrained(DIR, trust_remote_code=True)
query = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
text = processor.apply_chat_template(query, enable_thinking=True)
inputs = processor(images=[Image.open("image.jpg")], text=text, return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=256)[0]))
```

The model is transformers' Cohere2Vision. The processor in this folder makes tiles and prompts as in training. Without
`trust_remote_code` it is Cohere2Vision's own (it needs torchvision), which makes other tiles of most images: it
stretches an image over its tiles where training kept the aspect ratio and left black margins, takes any grid of as many
tiles where training had a largest number of columns and rows, and resizes with torchvision instead of Pillow. An image
that is one tile in size is the same to both. Blanks at a query's end may also become other tokens.

`enable_thinking=True` asks for a thought; without it there is usually none. The template writes special tokens as text:
strip `<s>`, `[|Human|]:`, `<image>` and the like from what strangers type."""
