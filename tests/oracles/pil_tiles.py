"""AnyRes tiles by Pillow and numpy alone: the independent reference for nemo_bluelm.data.decode."""

import io
import math
import warnings

import numpy as np
from PIL import Image, ImageOps


def decode(data: bytes) -> Image.Image:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(image) / 65535 * 255).astype(np.uint8)).convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it drops alpha
        return image.convert("RGB")


def tiles(data: bytes, grid: tuple[int, int], tile: int, thumbnail: bool = True) -> np.ndarray:
    """uint8 [n, 3, tile, tile]; ``grid`` is (columns, rows)."""
    image = decode(data)
    cols, rows = grid
    scale = min(cols * tile / image.width, rows * tile / image.height)
    width = min(math.ceil(round(image.width * scale, 6)), cols * tile)
    height = min(math.ceil(round(image.height * scale, 6)), rows * tile)
    canvas = Image.new("RGB", (cols * tile, rows * tile))
    left, top = (canvas.width - width) // 2, (canvas.height - height) // 2
    canvas.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
    boxes = [(c * tile, r * tile, (c + 1) * tile, (r + 1) * tile) for r in range(rows) for c in range(cols)]
    cut = [canvas.crop(box) for box in boxes]
    if thumbnail and cols * rows > 1:
        cut.append(image.resize((tile, tile), Image.Resampling.BICUBIC))
    return np.stack([np.asarray(one).transpose(2, 0, 1) for one in cut])
