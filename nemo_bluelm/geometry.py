"""AnyRes arithmetic: which grid of tiles an image gets, and how many tokens that costs. No torch."""

import math
from dataclasses import dataclass
from functools import cached_property

from nemo_bluelm.errors import UserError


@dataclass(frozen=True)
class Geometry:
    """How an image becomes tiles, patches and tokens. Sizes in pixels; grids are (columns, rows).

    Args:
        tile: side of a square tile.
        patch: side of a square ViT patch; must divide ``tile``.
        merge: side of the token fold: ``merge x merge`` patches become one token, an odd patch grid is zero-padded
            at its end (VILA's downsampler; 27 -> 28 patches a side -> 14 x 14 = 196 tokens).
        max_cols, max_rows: largest grid (1512 x 1512 pixels at 4 x 4 tiles of 378).
        alpha: relaxation of the aspect-ratio match (BlueLM-V-3B, arXiv 2411.10640, Algorithm 1, 0.1).
        thumbnail: append the whole image as one more tile, last; an image of one tile gets none.

    Raises:
        UserError: a size that cannot tile, or an alpha outside [0, 1).
    """

    tile: int = 378
    patch: int = 14
    merge: int = 2
    max_cols: int = 4
    max_rows: int = 4
    alpha: float = 0.1
    thumbnail: bool = True

    def __post_init__(self):
        for name in ("tile", "patch", "merge", "max_cols", "max_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"model.geometry.{name} is {getattr(self, name)}; it must be 1 or more")
        if self.tile % self.patch:
            raise UserError(
                f"model.geometry.tile is {self.tile}, not a multiple of patch {self.patch}; "
                f"the nearest is {max(1, round(self.tile / self.patch)) * self.patch}"
            )
        if not 0 <= self.alpha < 1:
            raise UserError(f"model.geometry.alpha is {self.alpha}; it must be at least 0 and below 1")

    @property
    def patches_per_side(self) -> int:
        return self.tile // self.patch

    @property
    def tokens_per_side(self) -> int:
        return math.ceil(self.patches_per_side / self.merge)

    @property
    def tokens_per_tile(self) -> int:
        return self.tokens_per_side**2

    @cached_property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Candidate (columns, rows), largest first: the relaxed match depends on this order."""
        pairs = [(cols, rows) for cols in range(1, self.max_cols + 1) for rows in range(1, self.max_rows + 1)]
        return tuple(sorted(pairs, key=lambda g: (g[0] * g[1], g), reverse=True))

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) for an image of ``width x height`` pixels.

        Algorithm 1 of arXiv 2411.10640: keep the most effective pixels, and among grids within ``alpha`` of that
        the one that wastes the fewest. With ``alpha=0`` it is LLaVA-NeXT's rule.

        Raises:
            UserError: a side below one pixel.
        """
        if width < 1 or height < 1:
            raise UserError(f"an image of {width} x {height} pixels has no grid; both sides must be 1 or more")
        best, best_effective, best_wasted = (1, 1), 0, math.inf
        for cols, rows in self.grids:
            canvas_width, canvas_height = cols * self.tile, rows * self.tile
            scale = min(canvas_width / width, canvas_height / height)
            effective = min(int(width * scale) * int(height * scale), width * height)
            wasted = canvas_width * canvas_height - effective
            slack = self.alpha * best_effective
            better = effective - best_effective > slack
            # "==" is the rule at alpha 0, where the strict "<" can never hold.
            close = best_effective - effective < slack or effective == best_effective
            if better or (close and wasted < best_wasted):
                best, best_effective, best_wasted = (cols, rows), effective, wasted
        return best

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) to resize to inside the grid's canvas; keeps the aspect ratio, rounds up as LLaVA-NeXT."""
        cols, rows = self.grid(width, height)
        canvas_width, canvas_height = cols * self.tile, rows * self.tile
        scale_width, scale_height = canvas_width / width, canvas_height / height
        if scale_width < scale_height:
            return canvas_width, min(math.ceil(height * scale_width), canvas_height)
        return min(math.ceil(width * scale_height), canvas_width), canvas_height

    def tiles(self, width: int, height: int) -> int:
        """Tiles of an image, the thumbnail counted."""
        cols, rows = self.grid(width, height)
        return cols * rows + (self.thumbnail and cols * rows > 1)

    def image_tokens(self, width: int, height: int) -> int:
        """Language-model tokens of an image."""
        return self.tiles(width, height) * self.tokens_per_tile
