"""Cuts an image into AnyRes tiles, whatever resizes it."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nemo_bluelm.geometry import Geometry

# ATen hands copies of this many elements to its thread pool, which costs more than they do and fights ours.
_ATEN_GRAIN = 32_768


def cut_tiles(geometry: Geometry, width: int, height: int, resize: Callable[[int, int], Tensor]) -> Tensor:
    """Tiles of an image of ``width x height`` pixels.

    Args:
        resize: makes uint8 [3, h, w], of any strides, from the whole image, given (w, h).

    Returns:
        uint8 [n, 3, T, T] on the CPU, n = ``geometry.tiles(width, height)``, T = ``geometry.tile``: the grid row by
        row, then the thumbnail (the whole image squashed to T x T) unless the grid is 1 x 1. The image keeps its
        aspect ratio and is centred on its canvas; the margin is 0.
    """
    tile = geometry.tile
    cols, rows = geometry.grid(width, height)
    fit_width, fit_height = geometry.fit(width, height)
    # numpy's zeros are the system's: a margin costs nothing.
    tiles = torch.from_numpy(np.zeros((geometry.tiles(width, height), 3, tile, tile), np.uint8))
    fitted = resize(fit_width, fit_height)
    for row, (source_y, target_y) in enumerate(_spans(rows, tile, fit_height)):
        for col, (source_x, target_x) in enumerate(_spans(cols, tile, fit_width)):
            _copy(tiles[row * cols + col, :, target_y, target_x], fitted[:, source_y, source_x])
    if len(tiles) > cols * rows:
        _copy(tiles[-1], resize(tile, tile))
    return tiles


def _spans(count: int, tile: int, length: int) -> list[tuple[slice, slice]]:
    """Along one axis: where each of ``count`` tiles meets the centred image, in the image and in the tile."""
    margin = (count * tile - length) // 2
    spans = []
    for start in range(-margin, count * tile - margin, tile):
        first = max(start, 0)
        last = max(min(start + tile, length), first)
        spans.append((slice(first, last), slice(first - start, last - start)))
    return spans


def _copy(target: Tensor, source: Tensor) -> None:
    """uint8 [3, h, w] to the same shape, in bands that ATen copies in the calling thread."""
    _, height, width = target.shape
    band = max(1, (_ATEN_GRAIN - 1) // (3 * max(width, 1)))
    for top in range(0, height, band):
        target[:, top : top + band] = source[:, top : top + band]
