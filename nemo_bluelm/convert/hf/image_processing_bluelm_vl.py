"""Images to AnyRes tiles: the grid of arXiv 2411.10640, Algorithm 1, Pillow's bicubic, zero margins."""

import math

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature


class BlueLMVLImageProcessor(BaseImageProcessor):
    """
    Args:
        tile, patch: sides in pixels.
        merge: patches folded into a token, in each direction.
        max_cols, max_rows: largest grid.
        alpha: how much of the effective pixels a grid may lose to waste less.
        thumbnail: an image of more than one tile ends with the whole image squashed to a tile.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, tile=378, patch=14, merge=2, max_cols=4, max_rows=4, alpha=0.1, thumbnail=True, **kwargs):
        super().__init__(**kwargs)
        self.tile, self.patch, self.merge = tile, patch, merge
        self.max_cols, self.max_rows, self.alpha, self.thumbnail = max_cols, max_rows, alpha, thumbnail

    @property
    def tokens_per_tile(self) -> int:
        return math.ceil(self.tile // self.patch / self.merge) ** 2

    def grid(self, width: int, height: int) -> tuple:
        """(columns, rows) for an image of ``width x height`` pixels."""
        pairs = [(cols, rows) for cols in range(1, self.max_cols + 1) for rows in range(1, self.max_rows + 1)]
        best, best_effective, best_wasted = (1, 1), 0, math.inf
        for cols, rows in sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair), reverse=True):
            canvas_width, canvas_height = cols * self.tile, rows * self.tile
            scale = min(canvas_width / width, canvas_height / height)
            effective = min(int(width * scale) * int(height * scale), width * height)
            wasted = canvas_width * canvas_height - effective
            slack = self.alpha * best_effective
            better = effective - best_effective > slack
            close = best_effective - effective < slack or effective == best_effective
            if better or (close and wasted < best_wasted):
                best, best_effective, best_wasted = (cols, rows), effective, wasted
        return best

    def fit(self, width: int, height: int) -> tuple:
        """(width, height) to resize to inside the grid's canvas."""
        cols, rows = self.grid(width, height)
        canvas_width, canvas_height = cols * self.tile, rows * self.tile
        scale_width, scale_height = canvas_width / width, canvas_height / height
        if scale_width < scale_height:
            return canvas_width, min(math.ceil(height * scale_width), canvas_height)
        return min(math.ceil(width * scale_height), canvas_width), canvas_height

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs=None) -> int:
        """Tiles of an image, the thumbnail counted."""
        cols, rows = self.grid(width, height)
        return cols * rows + int(self.thumbnail and cols * rows > 1)

    def tiles(self, image: Image.Image) -> np.ndarray:
        """uint8 [n, tile, tile, 3], row by row, then the thumbnail."""
        cols, rows = self.grid(*image.size)
        width, height = self.fit(*image.size)
        canvas = np.zeros((rows * self.tile, cols * self.tile, 3), np.uint8)
        top, left = (rows * self.tile - height) // 2, (cols * self.tile - width) // 2
        canvas[top : top + height, left : left + width] = image.resize((width, height), Image.Resampling.BICUBIC)
        cut = canvas.reshape(rows, self.tile, cols, self.tile, 3).swapaxes(1, 2)
        cut = cut.reshape(rows * cols, self.tile, self.tile, 3)
        if self.thumbnail and cols * rows > 1:
            whole = np.array(image.resize((self.tile, self.tile), Image.Resampling.BICUBIC))
            cut = np.concatenate([cut, whole[None]])
        return cut

    def preprocess(self, images, return_tensors=None, **kwargs) -> BatchFeature:
        """
        Args:
            images: Pillow's, or arrays or tensors of 8 bits with channels first or last; one, or lists of them.

        Returns:
            ``pixel_values``, fp32 [tiles of all images, 3, tile, tile], and ``num_patches``, tiles of each image.
        """
        tiles = [self.tiles(_upright(image)) for image in _flat(images)]
        pixels = torch.from_numpy(np.concatenate(tiles)).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0
        return BatchFeature({"pixel_values": pixels, "num_patches": [len(image) for image in tiles]})

    def __call__(self, images, *args, **kwargs) -> BatchFeature:
        return self.preprocess(images, *args, **kwargs)


def _flat(images) -> list:
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in _flat(part)]
    return [images]


def _upright(image) -> Image.Image:
    """Mode RGB; alpha is dropped, 16-bit gray scaled."""
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.ndim != 3 or array.dtype != np.uint8:
            raise ValueError(f"an image is {array.dtype} of shape {array.shape}; give Pillow's or 8 bits, 3 axes")
        if array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
            array = array.transpose(1, 2, 0)
        image = Image.fromarray(array.repeat(3, 2) if array.shape[2] == 1 else np.ascontiguousarray(array))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    return image.convert("RGB")
