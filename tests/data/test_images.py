"""Tiles against the Pillow reference, sizes from headers, errors."""

import io
import struct
import zlib

import numpy as np
import pil_tiles
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from nemo_bluelm.data.images import image_size, load_tiles
from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry

TINY, FULL = Geometry(tile=56), Geometry()
PHOTO = load_sample_image("china.jpg")


def encode(pixels, form="PNG", orientation=None, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if orientation:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def photo(width, height, mode="RGB"):
    image = Image.fromarray(PHOTO).resize((width, height))
    if mode == "I;16":
        gray = np.asarray(image.convert("L")).astype(np.uint16)
        return Image.fromarray((gray.astype(int) * 257 - (gray > 0) * 100).astype(np.uint16))
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(PHOTO[..., 0]).resize((width, height)))
        return image
    return image.convert(mode)


CASES = {
    "one-pixel": (encode(photo(1, 1)), TINY),
    "digit": (encode(photo(8, 8, "L")), TINY),
    "exact-tile": (encode(photo(56, 56)), TINY),
    "wide": (encode(photo(400, 30)), TINY),
    "tall": (encode(photo(20, 700)), TINY),
    "line": (encode(photo(3000, 2)), TINY),
    "jpeg": (encode(photo(640, 427), "JPEG", quality=90), FULL),
    "jpeg-large": (encode(photo(1500, 1100), "JPEG", quality=85), FULL),
    "jpeg-gray": (encode(photo(300, 200, "L"), "JPEG"), TINY),
    "jpeg-cmyk": (encode(photo(300, 200, "CMYK"), "JPEG"), TINY),
    "webp": (encode(photo(210, 180), "WEBP"), TINY),
    "bmp": (encode(photo(210, 180), "BMP"), TINY),
    "tiff": (encode(photo(210, 180), "TIFF"), TINY),
    "rgba": (encode(photo(300, 200, "RGBA")), TINY),
    "gray-alpha": (encode(photo(300, 200, "LA")), TINY),
    "palette": (encode(photo(300, 200, "P")), TINY),
    "palette-alpha": (encode(photo(300, 200, "P"), transparency=bytes(range(256))), TINY),
    "one-bit": (encode(photo(300, 200, "1")), TINY),
    "gray-16": (encode(photo(300, 200, "I;16")), TINY),
    "gray-16-exif": (encode(photo(300, 200, "I;16"), "TIFF", 6), TINY),
    "png-exif": (encode(photo(300, 200), "PNG", 6), TINY),
    "webp-exif": (encode(photo(300, 200), "WEBP", 8), TINY),
} | {f"exif-{o}": (encode(photo(500, 200), "JPEG", o, quality=95), TINY) for o in range(2, 9)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", CASES)
def test_tiles_agree_with_pillow(case):
    data, geometry = CASES[case]
    width, height = image_size(data)
    assert (width, height) == pil_tiles.decode(data).size
    expected = pil_tiles.tiles(data, geometry.grid(width, height), geometry.tile)
    tiles = load_tiles(data, geometry)
    assert tiles.dtype == torch.uint8 and tiles.is_contiguous()
    assert tiles.shape == expected.shape == (geometry.tiles(width, height), 3, geometry.tile, geometry.tile)
    difference = np.abs(tiles.numpy().astype(int) - expected)
    assert difference.max() <= 16 and difference.mean() <= 0.25


def test_order_of_tiles_and_margin():
    """Four colours in a 2 x 1 image: left tile, right tile, thumbnail last."""
    pixels = np.zeros((56, 112, 3), np.uint8)
    pixels[:, :56], pixels[:, 56:] = (255, 0, 0), (0, 0, 255)
    left, right, thumbnail = load_tiles(encode(pixels), TINY)
    assert left[0].min() == 255 and right[2].min() == 255 and left[2].max() == right[0].max() == 0
    assert thumbnail[0, 0, 0] == 255 and thumbnail[2, 0, -1] == 255
    (tile,) = load_tiles(encode(np.full((20, 40, 3), 200, np.uint8)), TINY)
    assert (tile[:, 14:42] == 200).all() and tile[:, :14].max() == 0 and tile[:, 42:].max() == 0


def test_alpha_is_dropped_not_composited():
    pixels = np.full((56, 56, 4), 90, np.uint8)
    pixels[..., 3] = 0
    assert (load_tiles(encode(pixels), TINY) == 90).all()


def test_sixteen_bits_are_scaled_not_clipped():
    pixels = np.full((56, 56), 0x8000, np.uint16)
    assert (load_tiles(encode(pixels), TINY) == 128).all()


def test_size_needs_the_header_only():
    class Header(io.BytesIO):
        largest = 0

        def read(self, size=-1):
            data = super().read(size)
            self.largest = max(self.largest, self.tell())
            return data

    rng = np.random.default_rng(0)
    data = encode(rng.integers(0, 256, (700, 900, 3), dtype=np.uint8))
    stream = Header(data)
    assert image_size(stream) == (900, 700)
    assert stream.largest < len(data) // 10


def bomb(side):
    """A PNG header that claims side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    checked = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + checked + struct.pack(">I", 10) + b"IDAT"


JPEG = encode(photo(300, 200), "JPEG")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not an image"),
        (b"<html></html>", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not"),
        (encode(photo(30, 20), "GIF"), "not an image"),
        (bomb(10_000), "100000000 pixels"),
        (bomb(60_000), "pixels"),
        (encode(np.ones((5, 5), np.float32), "TIFF"), "32-bit gray"),
        (JPEG[: len(JPEG) // 2], "does not decode"),
        (encode(photo(300, 200))[:9000], "does not decode"),
    ],
)
def test_errors_are_one_line_that_names_the_image(data, words):
    with pytest.raises(UserError) as error:
        load_tiles(data, TINY, "image 5.0.png")
    assert str(error.value).startswith("image 5.0.png ") and words in str(error.value)
    assert "\n" not in str(error.value)
