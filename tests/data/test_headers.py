"""Headers: sizes after EXIF without decoding, and everything that is refused before a pixel is read."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from nemo_bluelm.data.headers import FORMATS, MAX_ASPECT, BadImage, Header, open_image, read_header
from nemo_bluelm.errors import UserError


def encode(image, form="PNG", orientation=None, **options):
    if orientation:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_header(width, height):
    """A PNG that claims a size and has no pixels to match."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", FORMATS)
def test_formats(form):
    data = encode(Image.new("RGB", (40, 20)), form)
    assert read_header(data) == Header(form, 40, 20, 1) == read_header(io.BytesIO(data))


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_the_one_after_exif(form, orientation):
    header = read_header(encode(Image.new("RGB", (40, 20)), form, orientation))
    assert (header.width, header.height) == ((20, 40) if orientation >= 5 else (40, 20))
    assert header.orientation == orientation


def test_pillow_turns_a_tiff_itself():
    image, header = open_image(encode(Image.new("RGB", (40, 20)), "TIFF", 6))
    assert (header.width, header.height, header.orientation) == (20, 40, 1)
    assert image.convert("RGB").size == (20, 40)


@pytest.mark.parametrize("orientation", [0, 9, 4242])
def test_an_orientation_that_does_not_exist_is_none(orientation):
    header = read_header(encode(Image.new("RGB", (40, 20)), "JPEG", orientation or None))
    assert (header.width, header.height, header.orientation) == (40, 20, 1)


def test_only_the_header_is_read():
    class Counted(io.BytesIO):
        furthest = 0

        def read(self, size=-1):
            data = super().read(size)
            self.furthest = max(self.furthest, self.tell())
            return data

    pixels = np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8)
    stream = Counted(encode(Image.fromarray(pixels)))
    assert read_header(stream).width == 900
    assert stream.furthest < len(stream.getvalue()) // 10


@pytest.mark.parametrize("size", [(8, 8), (800, 8), (30_000, 2000), (8000, 8000)])
def test_sizes_at_the_limits_pass(size):
    assert read_header(png_header(*size)).width == size[0]


BAD = {
    "empty": (b"", "not an image"),
    "one byte": (b"\xff", "not an image"),
    "html": (b"<html></html>", "not an image"),
    "gif": (encode(Image.new("P", (40, 20)), "GIF"), "not an image; expected one of JPEG"),
    "header cut": (encode(Image.new("RGB", (40, 20)))[:20], "not a"),
    "jpeg header cut": (encode(Image.new("RGB", (400, 200)), "JPEG")[:100], "not a"),
    "one pixel": (encode(Image.new("RGB", (1, 1))), "1 x 1 pixels, a side is below 8"),
    "thin": (png_header(7, 500), "a side is below 8"),
    "long": (png_header(30_001, 1000), "a side is above 30,000"),
    "large": (png_header(8001, 8000), "more than 64,000,000"),
    "bomb": (png_header(60_000, 60_000), "more than 64,000,000 pixels"),
    "bomb that Pillow only warns about": (png_header(12_000, 10_000), "more than 64,000,000"),
    "stripe": (png_header(8 * MAX_ASPECT + 1, 8), "more than 100 times as long as wide"),
    "32-bit gray": (encode(Image.new("I", (40, 20)), "TIFF"), "32-bit gray"),
    "float gray": (encode(Image.new("F", (40, 20)), "TIFF"), "32-bit gray"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    data, words = BAD[case]
    with pytest.raises(BadImage) as error:
        read_header(data)
    assert words in str(error.value) and isinstance(error.value, UserError)
