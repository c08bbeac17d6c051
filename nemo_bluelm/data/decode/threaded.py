"""What the torch and the pil backend share: Pillow decodes, one image after the other or on a few threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from torch import Tensor

from nemo_bluelm.data.decode import BadSample
from nemo_bluelm.data.decode.pillow import decode
from nemo_bluelm.data.headers import BadImage
from nemo_bluelm.data.tiles import cut_tiles
from nemo_bluelm.geometry import Geometry

Resize = Callable[[int, int], Tensor]  # (width, height) -> uint8 [3, height, width]


def decode_tiles(data: bytes, geometry: Geometry, resizer: Callable[[Image.Image], Resize]) -> Tensor:
    """Tiles of one image. Raises ``BadImage``."""
    image = decode(data)
    return cut_tiles(geometry, *image.size, resizer(image))


class ThreadedBackend:
    """A decode backend on the CPU that differs from its likes by its resize alone.

    Args:
        name: the backend's name.
        resizer: makes a resize function from an RGB image.
        threads: images at a time.
    """

    def __init__(self, name: str, resizer: Callable[[Image.Image], Resize], threads: int):
        self.name, self._resizer = name, resizer
        self._map = ThreadPoolExecutor(threads, f"decode-{name}").map if threads > 1 else map

    def tiles(self, images: Sequence[bytes], geometry: Geometry) -> list[Tensor | BadSample]:
        """See :class:`~nemo_bluelm.data.decode.Backend`."""

        def one(data: bytes) -> Tensor | BadSample:
            try:
                return decode_tiles(data, geometry, self._resizer)
            except BadImage as error:
                return BadSample(str(error))

        return list(self._map(one, images))
