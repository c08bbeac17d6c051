"""Image bytes to uint8 AnyRes tiles: Pillow decodes, ATen resizes.

Pixels agree with a pure Pillow implementation to 16 levels at most and 0.25 on average (Pillow rounds between its two
resize passes). Policies: EXIF orientation is applied; alpha is dropped, not composited, as Pillow's
``convert("RGB")``, DALI and transformers do; 16-bit gray is scaled to 8 bits, where Pillow alone would clip it.
"""

import io
import warnings
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn.functional import interpolate

from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000")  # what every decode backend reads alike

_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def image_size(data: bytes | BinaryIO, name: str = "image") -> tuple[int, int]:
    """(width, height) in pixels after EXIF orientation, from the header alone.

    Raises:
        UserError: not an image of one of ``FORMATS``, or above Pillow's decompression-bomb limit.
    """
    image, orientation = _open(data, name)
    width, height = image.size
    return (height, width) if orientation >= 5 else (width, height)


def load_tiles(data: bytes, geometry: Geometry, name: str = "image") -> torch.Tensor:
    """Decode an image and cut it into tiles.

    Returns:
        uint8 [n, 3, T, T] RGB, n = ``geometry.tiles(width, height)``, T = ``geometry.tile``: the grid row by row,
        then the thumbnail (the whole image squashed to T x T) unless the grid is 1 x 1. The image is resized with its
        aspect ratio kept and centred on its canvas; the margin is 0.

    Raises:
        UserError: as :func:`image_size`, or the pixels don't decode. It names ``name``.
    """
    image = _decode(data, name)
    height, width = image.shape[2:]
    tile = geometry.tile
    cols, rows = geometry.grid(width, height)
    fit_width, fit_height = geometry.fit(width, height)
    top, left = (rows * tile - fit_height) // 2, (cols * tile - fit_width) // 2
    # Copies by numpy: torch hands even these small ones to its thread pool, which costs more than they do.
    canvas = np.zeros((rows * tile, cols * tile, 3), np.uint8)
    canvas[top : top + fit_height, left : left + fit_width] = _resize(image, fit_width, fit_height)
    count = cols * rows
    tiles = np.empty((geometry.tiles(width, height), 3, tile, tile), np.uint8)
    tiles[:count] = canvas.reshape(rows, tile, cols, tile, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, tile, tile)
    if len(tiles) > count:
        tiles[count] = _resize(image, tile, tile).transpose(2, 0, 1)
    return torch.from_numpy(tiles)


def _open(data: bytes | BinaryIO, name: str) -> tuple[Image.Image, int]:
    """The lazily opened image and its EXIF orientation (1 to 8); reads the header only."""
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an error below
            image = Image.open(stream, formats=FORMATS)
        # PngImageFile.getexif() decodes the pixels when it met no EXIF before them; EXIF behind them doesn't count.
        # TiffImageFile turns its size and pixels by itself.
        upright = image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info)
        orientation = 1 if upright else image.getexif().get(_ORIENTATION, 1)
    except UnidentifiedImageError:
        raise UserError(f"{name} is not an image; expected one of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's plugins raise what they like on broken headers
        raise UserError(f"{name} is not a readable image: {error}") from error
    limit, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
    if limit is not None and pixels > limit:
        raise UserError(f"{name} has {pixels} pixels, above Pillow's limit of {limit}; scale it down")
    if image.mode in ("I", "F"):
        raise UserError(f"{name} has 32-bit gray pixels of no defined range; save it with 8 or 16 bits")
    return image, orientation if orientation in _TRANSPOSE else 1


def _decode(data: bytes, name: str) -> torch.Tensor:
    """uint8 [1, 3, height, width], channels last in memory."""
    image, orientation = _open(data, name)
    try:
        if image.mode.startswith("I;16"):
            gray = np.asarray(image).astype(np.uint32)
            image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))  # 65535 / 255 = 257
        image.info.pop("transparency", None)  # else Pillow warns that it drops it
        image = image.convert("RGB")
    except Exception as error:
        raise UserError(f"{name} does not decode: {error}; replace it or remove the sample") from error
    if orientation != 1:
        image = image.transpose(_TRANSPOSE[orientation])
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def _resize(image: torch.Tensor, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]. Channels last takes ATen's fast uint8 path."""
    return interpolate(image, size=(height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
