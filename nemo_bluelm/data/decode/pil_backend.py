"""The ``pil`` backend: Pillow decodes and resizes. Slow; the reference that the others are compared with."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nemo_bluelm.data.decode.threaded import Resize, ThreadedBackend


def make(threads: int) -> ThreadedBackend:
    return ThreadedBackend("pil", resizer, threads)


def resizer(image: Image.Image) -> Resize:
    """Pillow's bicubic."""

    def resize(width: int, height: int) -> Tensor:
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)

    return resize
