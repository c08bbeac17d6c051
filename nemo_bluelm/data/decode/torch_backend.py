"""The ``torch`` backend: Pillow decodes, ATen resizes. The fastest on CPUs."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from nemo_bluelm.data.decode.threaded import Resize, ThreadedBackend


def make(threads: int) -> ThreadedBackend:
    return ThreadedBackend("torch", resizer, threads)


def resizer(image: Image.Image) -> Resize:
    """Antialiased bicubic by ATen; within 16 levels of Pillow, which rounds between its two passes."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # channels last, ATen's fast uint8 path

    def resize(width: int, height: int) -> Tensor:
        return interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)[0]

    return resize
