"""Image bytes to uint8 AnyRes tiles, by one of three backends behind one contract.

``torch``
    Pillow decodes, ATen resizes. The fastest on CPUs and the default.
``pil``
    Pillow decodes and resizes. Slow; the reference that the others are compared with.
``dali``
    DALI decodes JPEG, resizes and cuts everything; on the CPU, or on a GPU where the tiles then stay.

Whatever the backend, the same images are good, and these policies hold:

Header first. No decoder sees bytes that :mod:`nemo_bluelm.data.headers` refuses: unknown formats, decompression bombs,
    sizes outside its limits. Of an animation or a file of several pages the first is taken.
Orientation. EXIF orientation is applied, in every format that has it (JPEG, PNG, WebP, TIFF); in PNG only
    where it stands before the pixels. A value outside 1 to 8 counts as upright.
Alpha. It is dropped, not composited: the colours beneath it are taken as they are, as transformers' image processors
    do. So is a palette's and a colour key's transparency.
16 bits. Scaled to 8, never clipped: gray is divided by 257 and rounded, of colours the high byte is taken.
    32-bit gray has no defined range and is refused.
Colours. Converted to RGB by the plain formulas of the decoder; embedded ICC profiles are not applied.
Pixels. ``pil`` is Pillow's bicubic, bit by bit; ``torch`` and ``dali`` on the CPU are within 16 levels of it, 0.25 on
    average on photos, and don't depend on the batch or the number of threads. A GPU's JPEG decoder rounds differently.
"""

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, Union

from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry

if TYPE_CHECKING:  # importing this package is light
    from torch import Tensor

BACKENDS = ("torch", "dali", "pil")
DEVICES = ("cpu", "gpu")


class BadSample(NamedTuple):
    """Stands in the place of an image's tiles: why there are none, in one line."""

    reason: str


class Backend(Protocol):
    """Makes tiles. Its methods may be called from several threads."""

    name: str

    def tiles(self, images: Sequence[bytes], geometry: Geometry) -> list[Union["Tensor", BadSample]]:
        """Tiles of encoded images, in their order; a bad image never raises and never harms its neighbours.

        Returns:
            For each image uint8 [n, 3, T, T], RGB, contiguous, n = ``geometry.tiles(width, height)`` for its upright
            size, T = ``geometry.tile``: the grid row by row, then the thumbnail (the whole image squashed to T x T)
            unless the grid is 1 x 1. On the CPU; on the CUDA device from ``dali`` on ``gpu``.
        """


def get_backend(name: str, device: str = "cpu", threads: int = 1) -> Backend:
    """A decode backend.

    Args:
        name: ``torch``, ``dali`` or ``pil``.
        device: ``cpu``; ``dali`` also runs on ``gpu``, the current CUDA device.
        threads: images, or DALI's operations, at a time.

    Raises:
        UserError: an unknown name or device, DALI is not installed, ``gpu`` without CUDA or with a backend that has no
            GPU path.
    """
    if name not in BACKENDS:
        close = difflib.get_close_matches(name, BACKENDS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"{name!r} is no decode backend; {hint}there are {', '.join(BACKENDS)}")
    if device not in DEVICES:
        raise UserError(f"{device!r} is no decode device; there are {', '.join(DEVICES)}")
    if name == "dali":
        from nemo_bluelm.data.decode.dali_backend import DaliBackend

        return DaliBackend(device, threads)
    if device == "gpu":
        raise UserError(f"the {name} backend decodes on the CPU only; take device cpu or backend dali")
    if name == "torch":
        from nemo_bluelm.data.decode.torch_backend import make
    else:
        from nemo_bluelm.data.decode.pil_backend import make
    return make(threads)


def load_tiles(data: bytes, geometry: Geometry, name: str = "image", backend: str = "pil") -> "Tensor":
    """Tiles of one image, in the calling thread; those of an export's image processor, if by the ``pil`` backend.

    Returns:
        uint8 [n, 3, T, T], as :meth:`Backend.tiles`.

    Raises:
        UserError: it is a bad image; the message begins with ``name``.
    """
    (tiles,) = get_backend(backend).tiles([data], geometry)
    if isinstance(tiles, BadSample):
        raise UserError(f"{name}: {tiles.reason}")
    return tiles
