"""transformers' LLaVA-NeXT image processors as peers of the decode backends: same tiles, decoding included."""

import importlib.metadata
import importlib.util
import io
import sys
from collections.abc import Callable

from PIL import Image
from torch import Tensor

from nemo_bluelm.geometry import Geometry

_library = None  # torch forgets the schemas when it goes


def peers(geometry: Geometry) -> tuple[dict[str, Callable[[bytes], Tensor]], list[str]]:
    """The processors by name, each from a JPEG's bytes to [n, 3, T, T], and a note for what is missing.

    ``hf slow`` and ``hf fast`` give normalised float32, as they come; ``hf fast uint8`` leaves that out.
    """
    has_torchvision = importlib.util.find_spec("torchvision") is not None
    if has_torchvision:
        _import_torchvision()  # before transformers does
    import transformers

    found, notes = {"hf slow": transformers.LlavaNextImageProcessor(**_settings(geometry))}, []
    if has_torchvision:
        fast = transformers.LlavaNextImageProcessorFast
        found["hf fast"] = fast(**_settings(geometry))
        found["hf fast uint8"] = fast(**_settings(geometry), do_rescale=False, do_normalize=False)
    else:
        notes.append(
            "transformers' fast processor needs torchvision: pip install --no-deps --target DIR "
            f"torchvision=={_matching_torchvision()}, then again with PYTHONPATH=DIR"
        )
    return {name: _decoding(processor) for name, processor in found.items()}, notes


def _matching_torchvision() -> str:
    """The release that goes with this torch: 0.28.0 with 2.13.0. A folder of its own keeps a misfit out of the way."""
    _, minor, patch = importlib.metadata.version("torch").split("+")[0].split(".")[:3]
    return f"0.{int(minor) + 15}.{patch}"


def _settings(geometry: Geometry) -> dict:
    tile = geometry.tile
    return {
        "size": {"shortest_edge": tile},
        "crop_size": {"height": tile, "width": tile},
        "image_grid_pinpoints": [[rows * tile, cols * tile] for cols, rows in geometry.grids],
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_center_crop": False,
        "do_pad": True,
    }


def _decoding(processor: Callable) -> Callable[[bytes], Tensor]:
    def run(data: bytes) -> Tensor:
        return processor(Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="pt")["pixel_values"][0]

    return run


def _import_torchvision() -> None:
    """Imports torchvision, also one whose compiled extension doesn't fit this torch (a CUDA wheel beside CPU torch).

    Without the extension its import fails only because it describes two operators that nobody has declared. The
    processors use neither.
    """
    global _library
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        import torch

        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
