"""JPEG files to measure with: photo mosaics of four common sizes, or the user's own."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from nemo_bluelm.errors import UserError

SIZES = ((640, 480), (1280, 960), (1920, 1080), (1080, 2400))  # width x height; the last is a phone's screen
_SKIMAGE = ("astronaut", "coffee", "chelsea", "rocket")


def make_images(count: int, seed: int = 7) -> list[bytes]:
    """``count`` JPEG files of quality 88, their sizes in turn ``SIZES``: six photos pasted on a seventh, and noise."""
    photos, rng = _photos(), np.random.default_rng(seed)
    return [_mosaic(photos, *SIZES[i % len(SIZES)], rng) for i in range(count)]


def read_images(folder: str, count: int) -> list[bytes]:
    """The first ``count`` JPEG files of a folder by name, repeated if there are fewer.

    Raises:
        UserError: there is none.
    """
    files = sorted(file for pattern in ("*.jpg", "*.jpeg") for file in Path(folder).glob(pattern))[:count]
    if not files:
        raise UserError(f"{folder} has no .jpg files; name a folder that has, or leave --folder out")
    data = [file.read_bytes() for file in files]
    return [data[i % len(data)] for i in range(count)]


def _photos() -> list[Image.Image]:
    try:
        import skimage.data
        import sklearn.datasets
    except ImportError as error:
        raise UserError(
            f"the images are made of photos that {error.name} brings; install it, or use --folder"
        ) from error
    arrays = [sklearn.datasets.load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    arrays += [getattr(skimage.data, name)() for name in _SKIMAGE]
    return [Image.fromarray(array) for array in arrays]


def _mosaic(photos: list[Image.Image], width: int, height: int, rng: np.random.Generator) -> bytes:
    def pick() -> Image.Image:
        return photos[rng.integers(len(photos))]

    image = pick().resize((width, height), Image.Resampling.LANCZOS)
    for _ in range(6):
        part_width, part_height = int(rng.integers(width // 6, width // 3)), int(rng.integers(height // 6, height // 3))
        place = int(rng.integers(width - part_width)), int(rng.integers(height - part_height))
        image.paste(pick().resize((part_width, part_height), Image.Resampling.LANCZOS), place)
    # Sensor noise, fine and coarse: without it the files decode faster than photos do.
    coarse = np.kron(rng.normal(0, 4, (height // 4 + 1, width // 4 + 1, 1)), np.ones((4, 4, 1)))[:height, :width]
    pixels = np.asarray(image) + rng.normal(0, 3, (height, width, 1)) + coarse
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
    return file.getvalue()
