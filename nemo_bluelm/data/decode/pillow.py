"""Pillow's decoder under the project's policies for orientation, alpha and 16 bits."""

import numpy as np
from PIL import Image

from nemo_bluelm.data.headers import BadImage, open_image

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes) -> Image.Image:
    """The upright image in mode RGB.

    Raises:
        BadImage: the header is refused (see :func:`~nemo_bluelm.data.headers.read_header`), or the pixels don't decode.
    """
    image, header = open_image(data)
    try:
        if image.mode.startswith("I;16"):
            gray = np.asarray(image).astype(np.uint32)
            image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))  # 65535 / 255 = 257
        image.info.pop("transparency", None)  # else Pillow warns that it drops it
        image = image.convert("RGB")
        return image if header.orientation == 1 else image.transpose(_TRANSPOSE[header.orientation])
    except Exception as error:  # Pillow's plugins raise what they like on broken pixels
        raise BadImage(f"does not decode: {error}") from error
