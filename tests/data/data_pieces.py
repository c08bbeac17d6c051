"""Small images and samples for the tests of the data path."""

import io

import numpy as np
from PIL import Image

from nemo_bluelm.data.writer import RawSample, question_record
from nemo_bluelm.geometry import Geometry

GEOMETRY = Geometry(tile=56, patch=14, merge=2, max_cols=4, max_rows=4)


def png(width: int, height: int, seed: int = 0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def image_sample(key: str, width: int = 8, height: int = 8) -> RawSample:
    return RawSample(key, question_record("What?", "7", None, "0.png", ["t"]), {"0.png": png(width, height)})
