"""Image headers: format, size after EXIF and the limits that keep hostile files out. Reads no pixels; no torch."""

import io
import warnings
from dataclasses import dataclass
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from nemo_bluelm.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000")  # what every decode backend reads alike
MAX_PIXELS = 64_000_000  # a decoded image takes three bytes a pixel, whatever its file weighs
MAX_SIDE = 30_000
MIN_SIDE = 8
MAX_ASPECT = 100

_ORIENTATION = 0x0112  # EXIF tag

# Such images are refused below. A filter for the whole process, because setting one for a call isn't thread safe.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="Corrupt EXIF data", category=UserWarning)


class BadImage(UserError):
    """An image that no backend shall decode; the message says why, without naming the image."""


@dataclass(frozen=True)
class Header:
    """What a header says.

    Attributes:
        format: one of ``FORMATS``.
        width, height: pixels, after the orientation is applied.
        orientation: EXIF orientation, 1 to 8, that the decoded pixels still need.
    """

    format: str
    width: int
    height: int
    orientation: int


def read_header(data: bytes | BinaryIO) -> Header:
    """The header of an image; reads a few kilobytes.

    Args:
        data: the file's bytes, or a seekable file.

    Raises:
        BadImage: not an image of one of ``FORMATS``, a broken header, 32-bit gray, or a size outside the limits.
    """
    return open_image(data)[1]


def open_image(data: bytes | BinaryIO) -> tuple[Image.Image, Header]:
    """The image, opened but not decoded and not turned, and its header.

    Raises:
        BadImage: as :func:`read_header`.
    """
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        image = Image.open(stream, formats=FORMATS)
        # PngImageFile.getexif() decodes the pixels when it met no EXIF before them; EXIF behind them doesn't count.
        # TiffImageFile turns its size and pixels by itself.
        upright = image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info)
        orientation = 1 if upright else image.getexif().get(_ORIENTATION, 1)
    except UserError:
        raise  # the file behind ``data`` can't be read
    except UnidentifiedImageError:
        raise BadImage(f"not an image; expected one of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"more than {MAX_PIXELS:,} pixels; scale it down") from None
    except Exception as error:  # Pillow's plugins raise what they like on broken headers
        raise BadImage(f"not a readable image: {error}") from error
    _check_size(*image.size)
    if image.mode in ("I", "F"):
        raise BadImage("32-bit gray pixels of no defined range; save it with 8 or 16 bits")
    if orientation not in range(1, 9):
        orientation = 1
    width, height = image.size[::-1] if orientation >= 5 else image.size
    kind = "JPEG" if image.format == "MPO" else image.format  # several JPEGs in one file, of which the first is taken
    return image, Header(kind, width, height, orientation)


def _check_size(width: int, height: int) -> None:
    size, short, long = f"{width} x {height} pixels", min(width, height), max(width, height)
    if short < MIN_SIDE:
        raise BadImage(f"{size}, a side is below {MIN_SIDE}; replace it")
    if long > MAX_SIDE:
        raise BadImage(f"{size}, a side is above {MAX_SIDE:,}; scale it down")
    if width * height > MAX_PIXELS:
        raise BadImage(f"{size}, more than {MAX_PIXELS:,}; scale it down")
    if long > MAX_ASPECT * short:
        raise BadImage(f"{size}, more than {MAX_ASPECT} times as long as wide; cut it")
