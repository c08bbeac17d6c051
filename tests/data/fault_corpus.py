"""Image files in memory, good ones of many kinds and broken ones, each with the outcome that is expected of it.

Needs numpy and Pillow alone. The images are small, some tiles of 56 pixels.
"""

import io
import random
import struct
import zlib
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

ORIENTATION = 0x0112  # EXIF tag
SIDE = 96
END = b"\xff\xd9"  # of a JPEG
BICUBIC = Image.Resampling.BICUBIC


class Case(NamedTuple):
    data: bytes
    good: bool


def encode(image: Image.Image, form: str, orientation: int | None = None, **options) -> bytes:
    if orientation:
        options["exif"] = exif(orientation)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def png_chunk(tag: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG by hand; ``rows`` are the filtered scan lines, ``extra`` are chunks before them."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body + png_chunk(b"IEND", b"")


def png16(pixels: np.ndarray) -> bytes:
    """uint16 [height, width, channels] as a PNG of 16 bits a channel, which Pillow can't write."""
    height, width, channels = pixels.shape
    lines = pixels.astype(">u2").reshape(height, -1)
    rows = b"".join(b"\0" + line.tobytes() for line in lines)
    return png(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], rows)


def photo(mode: str = "RGB", width: int = SIDE, height: int = SIDE) -> Image.Image:
    """Something with a photo's smooth areas, edges and noise; transparency grows from top to bottom."""
    rng = np.random.default_rng(3)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((width, height), BICUBIC)
    pixels = np.asarray(smooth) + rng.normal(0, 4, (height, width, 1))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (30, 60, 200)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        return image
    return image.convert(mode)


def sixteen(channels: int) -> np.ndarray:
    """uint16 [96, 96, channels]: the photo, its low byte filled too, alpha last where channels are even."""
    low = np.asarray(photo({1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels])).reshape(SIDE, SIDE, channels)
    return low.astype(np.uint16) * 256 + low[::-1]


def _patched(data: bytes, position: int, new: bytes) -> bytes:
    return data[:position] + new + data[position + len(new) :]


def _flipped(data: bytes, start: int, count: int = 40) -> bytes:
    """``count`` random bytes between ``start`` and the file's last two, never an 0xFF: no marker is made."""
    rng, damaged = random.Random(0), bytearray(data)
    for _ in range(count):
        position = rng.randrange(start, len(damaged) - 2)
        if damaged[position] != 0xFF and damaged[position - 1] != 0xFF:
            damaged[position] = rng.randrange(255)
    return bytes(damaged)


def _good() -> dict[str, bytes]:
    rgb, gray = photo(), photo("L")
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)

    def frames() -> dict:  # a new one each time: savers write into what they get
        return {"save_all": True, "append_images": [rgb.rotate(90)]}

    jpeg = encode(rgb, "JPEG", quality=88)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * 500_000, zip=True)
    return {
        "jpeg": jpeg,
        "jpeg-gray": encode(gray, "JPEG"),
        "jpeg-cmyk": encode(rgb.convert("CMYK"), "JPEG"),
        "jpeg-progressive": encode(rgb, "JPEG", progressive=True),
        "jpeg-444": encode(rgb, "JPEG", subsampling=0),
        "jpeg-422": encode(rgb, "JPEG", subsampling=1),
        "jpeg-rgb": encode(rgb, "JPEG", keep_rgb=True),
        "jpeg-cut-but-ended": jpeg[: len(jpeg) // 2] + END,
        "jpeg-default-tables": jpeg.replace(b"\xff\xc4", b"\xff\xed"),
        "jpeg-multi-picture": encode(rgb, "MPO", **frames()),
        "jpeg-restarts": encode(rgb, "JPEG", restart_marker_blocks=4),
        "jpeg-quality-1": encode(rgb, "JPEG", quality=1),
        "jpeg-odd-size": encode(photo("RGB", 97, 61), "JPEG"),
        "jpeg-trailing-garbage": jpeg + random.Random(2).randbytes(3000),
        "jpeg-trailing-zeros": jpeg + bytes(512),
        "jpeg-two-in-one": jpeg + encode(rgb.rotate(90), "JPEG"),
        "jpeg-bit-flips": _flipped(jpeg, 700),
        "jpeg-orientation-0": encode(rgb, "JPEG", exif=exif(0)),
        "jpeg-orientation-9": encode(rgb, "JPEG", exif=exif(9)),
        "jpeg-broken-exif": encode(rgb, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        "png": encode(rgb, "PNG"),
        "png-gray": encode(gray, "PNG"),
        "png-rgba": encode(photo("RGBA"), "PNG"),
        "png-gray-alpha": encode(photo("LA"), "PNG"),
        "png-palette": encode(palette, "PNG"),
        "png-palette-alpha": encode(palette, "PNG", transparency=bytes(range(64))),
        "png-palette-key": encode(palette, "PNG", transparency=0),
        "png-palette-4-colours": encode(rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=4), "PNG", bits=2),
        "png-colour-key": encode(rgb, "PNG", transparency=rgb.getpixel((0, 0))),
        "png-one-bit": encode(photo("1"), "PNG"),
        "png-gray-16": png16(sixteen(1)),
        "png-gray-alpha-16": png16(sixteen(2)),
        "png-rgb-16": png16(sixteen(3)),
        "png-rgba-16": png16(sixteen(4)),
        "png-exif-6": encode(photo("RGB", 96, 60), "PNG", 6),
        "png-animated": encode(rgb, "PNG", **frames()),
        "png-missing-rows": png(SIDE, SIDE, 8, 2, bytes((1 + 3 * SIDE) * 5)),
        "png-text-bomb": encode(rgb, "PNG", pnginfo=text),
        "webp": encode(rgb, "WEBP"),
        "webp-lossless": encode(rgb, "WEBP", lossless=True),
        "webp-alpha": encode(photo("RGBA"), "WEBP"),
        "webp-exif-6": encode(photo("RGB", 96, 60), "WEBP", 6),
        "webp-animated": encode(rgb, "WEBP", **frames()),
        "bmp": encode(rgb, "BMP"),
        "bmp-gray": encode(gray, "BMP"),
        "bmp-palette": encode(palette, "BMP"),
        "bmp-one-bit": encode(photo("1"), "BMP"),
        "tiff": encode(rgb, "TIFF"),
        "tiff-lzw": encode(rgb, "TIFF", compression="tiff_lzw"),
        "tiff-jpeg": encode(rgb, "TIFF", compression="jpeg"),
        "tiff-gray-16": encode(Image.fromarray(sixteen(1)[..., 0]), "TIFF"),
        "tiff-rgba": encode(photo("RGBA"), "TIFF"),
        "tiff-cmyk": encode(rgb.convert("CMYK"), "TIFF"),
        "tiff-exif-6": encode(photo("RGB", 96, 60), "TIFF", 6),
        "tiff-two-pages": encode(rgb, "TIFF", **frames()),
        "jpeg2000": encode(rgb, "JPEG2000"),
        "jpeg2000-codestream": encode(rgb, "JPEG2000", no_jp2=True),
        "jpeg2000-gray": encode(gray, "JPEG2000"),
        "jpeg2000-rgba": encode(photo("RGBA"), "JPEG2000"),
        "jpeg2000-gray-16": encode(Image.fromarray(sixteen(1)[..., 0]), "JPEG2000"),
        "8x8": encode(photo("L", 8, 8), "PNG"),
        "wide": encode(photo("RGB", 2000, 50), "JPEG"),
        "tall": encode(photo("RGB", 50, 2000), "JPEG"),
    } | {f"jpeg-exif-{turn}": encode(photo("RGB", 96, 60), "JPEG", turn) for turn in range(1, 9)}


def _bad() -> dict[str, bytes]:
    rgb = photo()
    jpeg, lossless, webp = encode(rgb, "JPEG", quality=88), encode(rgb, "PNG"), encode(rgb, "WEBP")
    table = jpeg.index(b"\xff\xc4")
    frame, scan = jpeg.index(b"\xff\xc0"), jpeg.index(b"\xff\xda")
    blank = bytes(1 + 3 * 15_000)
    return {
        "empty": b"",
        "one-byte": b"\xff",
        "html": b"<html>404</html>" * 20,
        "noise": random.Random(1).randbytes(5000),
        "jpeg-bad-magic": _patched(jpeg, 0, b"\0\0"),
        "jpeg-half": jpeg[: len(jpeg) // 2],
        "jpeg-header-only": jpeg[:200],
        "jpeg-without-scan": jpeg[:scan],
        "jpeg-without-last-2": jpeg[:-2],
        "jpeg-broken-huffman-table": _patched(jpeg, table + 5, b"\xff" * 16),
        "jpeg-no-components": _patched(jpeg, frame + 9, b"\0"),
        "jpeg-zero-size": _patched(jpeg, frame + 5, struct.pack(">HH", 0, 0)),
        "jpeg-bomb-header": _patched(jpeg, frame + 5, struct.pack(">HH", 65500, 65500)),
        "png-half": lossless[: len(lossless) // 2],
        "png-signature-only": lossless[:8],
        "png-bad-checksum": _patched(lossless, 29, b"\0\0\0\0"),
        "png-bad-pixels": _flipped(lossless, 60),
        "png-no-pixels": png(SIDE, SIDE, 8, 2, b""),
        "png-bomb": png(15_000, 15_000, 8, 2, blank * 15_000),
        "png-bomb-header": png(60_000, 60_000, 8, 2, bytes(1 + 3 * 60_000)),
        "webp-half": webp[: len(webp) // 2],
        "webp-header-only": webp[:40],
        "bmp-half": encode(rgb, "BMP")[:9000],
        "tiff-half": encode(rgb, "TIFF", compression="tiff_lzw")[:6000],
        "tiff-32-bit-gray": encode(photo("F"), "TIFF"),
        "tiff-32-bit-integers": encode(photo("I"), "TIFF"),
        "jpeg2000-half": encode(rgb, "JPEG2000")[:8000],
        "gif": encode(rgb, "GIF"),
        "gif-animated": encode(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)]),
        "ppm": encode(rgb, "PPM"),
        "ico": encode(rgb, "ICO"),
        "1x1-jpeg": encode(photo("RGB", 1, 1), "JPEG"),
        "1x1-png": encode(photo("RGB", 1, 1), "PNG"),
        "thin": encode(photo("RGB", 20_000, 50), "JPEG"),
        "line": encode(photo("RGB", 2, 30_000), "PNG"),
        "long": encode(photo("RGB", 40_000, 500), "PNG"),
    }


@cache
def fault_corpus() -> dict[str, Case]:
    """Every kind by name."""
    good = {name: Case(data, True) for name, data in _good().items()}
    return good | {name: Case(data, False) for name, data in _bad().items()}
