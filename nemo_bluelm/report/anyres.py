"""The AnyRes viewer: one picture of what an image becomes for the model, drawn from the backend's own tiles."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nemo_bluelm.data.decode import Backend, BadSample
from nemo_bluelm.data.decode.pillow import decode
from nemo_bluelm.data.headers import Header, read_header
from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry

PAPER, INK, MUTED, RULE, CARD = "#fbfaf8", "#1d2330", "#667085", "#d9dce3", "#f1f2f5"
GRID, HATCH = "#e4572e", (255, 196, 61)

MARGIN, GAP = 40, 36
LEFT, CANVAS, THUMBNAIL = 400, 900, 260  # largest shown sides, px
LARGEST_TILE = 480  # shown side of a tile that is enlarged, px


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels: ``left``, ``top`` inclusive, ``right``, ``bottom`` exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        return self.right - self.left, self.bottom - self.top

    def moved(self, x: int, y: int) -> "Box":
        return Box(self.left + x, self.top + y, self.right + x, self.bottom + y)


@dataclass(frozen=True)
class AnyRes:
    """An image and what the backend made of it.

    Attributes:
        header: format, and size in pixels after EXIF orientation.
        tiles: uint8 [n, T, T, 3], in the model's order: the grid row by row, then the thumbnail if there is one.
    """

    name: str
    data: bytes
    header: Header
    geometry: Geometry
    backend: str
    tiles: np.ndarray

    @property
    def grid(self) -> tuple[int, int]:
        """(columns, rows)."""
        return self.geometry.grid(self.header.width, self.header.height)

    @property
    def fitted(self) -> tuple[int, int]:
        """(width, height) of the resized image on its canvas, in pixels."""
        return self.geometry.fit(self.header.width, self.header.height)

    @property
    def thumbnail(self) -> np.ndarray | None:
        cols, rows = self.grid
        return self.tiles[-1] if len(self.tiles) > cols * rows else None

    def tile_box(self, k: int) -> Box:
        """Where tile ``k`` of the grid lies on the canvas."""
        side, cols = self.geometry.tile, self.grid[0]
        left, top = k % cols * side, k // cols * side
        return Box(left, top, left + side, top + side)

    def canvas(self) -> np.ndarray:
        """The grid's tiles put together again, uint8 [rows * T, columns * T, 3]."""
        cols, rows = self.grid
        side = self.geometry.tile
        canvas = np.empty((rows * side, cols * side, 3), np.uint8)
        for k in range(cols * rows):
            box = self.tile_box(k)
            canvas[box.top : box.bottom, box.left : box.right] = self.tiles[k]
        return canvas

    def padding(self) -> list[Box]:
        """The canvas around the centred image: two boxes, one or none of them empty."""
        (cols, rows), (width, height) = self.grid, self.fitted
        right, bottom = cols * self.geometry.tile, rows * self.geometry.tile
        left, top = (right - width) // 2, (bottom - height) // 2
        around = [
            Box(0, 0, right, top),
            Box(0, top + height, right, bottom),
            Box(0, top, left, top + height),
            Box(left + width, top, right, top + height),
        ]
        return [box for box in around if min(box.size) > 0]

    def facts(self) -> dict:
        """The numbers of the caption, for programs."""
        (cols, rows), (width, height), geometry = self.grid, self.fitted, self.geometry
        canvas = cols * rows * geometry.tile**2
        return {
            "format": self.header.format,
            "width": self.header.width,
            "height": self.header.height,
            "orientation": self.header.orientation,
            "grid": [cols, rows],
            "canvas": [cols * geometry.tile, rows * geometry.tile],
            "fitted": [width, height],
            "padding": round(1 - width * height / canvas, 4),
            "tiles": len(self.tiles),
            "thumbnail": self.thumbnail is not None,
            "tokens_per_tile": geometry.tokens_per_tile,
            "tokens": len(self.tiles) * geometry.tokens_per_tile,
            "backend": self.backend,
        }


def view(name: str, data: bytes, geometry: Geometry, backend: Backend) -> AnyRes:
    """Let ``backend`` cut an image into tiles.

    Args:
        name: what the picture and the error messages call the image.
        data: the encoded image.

    Raises:
        UserError: not an image that training would take, or its pixels don't decode.
    """
    try:
        header = read_header(data)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    (tiles,) = backend.tiles([data], geometry)
    if isinstance(tiles, BadSample):
        raise UserError(f"{name}: {tiles.reason}")
    return AnyRes(name, data, header, geometry, backend.name, tiles.permute(0, 2, 3, 1).cpu().numpy())


def canvas_scale(canvas: tuple[int, int], tile: int) -> float:
    """How large the canvas is shown: shrunk to the picture, or enlarged by a whole factor so that pixels stay sharp."""
    scale = CANVAS / max(canvas)
    return scale if scale < 1 else max(1, min(int(scale), LARGEST_TILE // tile))


def draw(result: AnyRes) -> Image.Image:
    """The picture: the original and the thumbnail on the left, the canvas with its grid on the right, facts below."""
    original = _original(result)
    canvas = _draw_canvas(result)
    thumbnail = _draw_thumbnail(result)

    below_title = MARGIN + 76
    under = "Thumbnail, the last tile" if result.thumbnail is not None else "No thumbnail: the grid is one tile"
    titles = (_original_title(result), under)
    left_width = max(original.width, thumbnail.width, *(round(_font(16).getlength(title)) for title in titles))
    canvas_at = (MARGIN + left_width + GAP, below_title + 30)
    left_height = original.height + GAP + 30 + thumbnail.height
    body = max(left_height, canvas.height)
    facts = _facts(result)
    width = max(canvas_at[0] + canvas.width, MARGIN + sum(_fact_width(*fact) for fact in facts) - 30) + MARGIN
    width = max(width, 760)
    facts_at = canvas_at[1] + body + GAP
    page = Image.new("RGB", (width, facts_at + 92), PAPER)
    pen = ImageDraw.Draw(page)

    _text(pen, (MARGIN, MARGIN - 6), _short(result.name, _font(28), width - 2 * MARGIN), INK, 28)
    _text(pen, (MARGIN, MARGIN + 32), f"as the model sees it, tiles of the {result.backend} backend", MUTED, 16)

    _panel(pen, page, (MARGIN, below_title), titles[0], original)
    shown = f"Canvas {_by(result.facts()['canvas'])} px"
    _panel(pen, page, (canvas_at[0], below_title), shown + (", padding hatched" if result.padding() else ""), canvas)
    _panel(pen, page, (MARGIN, below_title + 30 + original.height + GAP), titles[1], thumbnail)

    pen.rectangle((0, facts_at, width, page.height), fill=CARD)
    pen.line((0, facts_at, width, facts_at), fill=RULE)
    x = MARGIN
    for label, value in facts:
        _text(pen, (x, facts_at + 20), label, MUTED, 14)
        _text(pen, (x, facts_at + 42), value, INK, 21)
        x += _fact_width(label, value)
    return page


def _original(result: AnyRes) -> Image.Image:
    """The image as a viewer shows it, upright and scaled into the left column."""
    image = decode(result.data)
    scale = min(LEFT / image.width, LEFT * 1.25 / image.height)
    scale = scale if scale < 1 else int(scale)
    # A short side of 4 at least: the panel of an extreme aspect ratio would be a hairline.
    size = max(4, round(image.width * scale)), max(4, round(image.height * scale))
    return _framed(image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS))


def _draw_canvas(result: AnyRes) -> Image.Image:
    pixels = Image.fromarray(result.canvas())
    scale = canvas_scale(pixels.size, result.geometry.tile)
    shown = _scaled(pixels, scale)
    for box in result.padding():
        _hatch(shown, _scale_box(box, scale))
    pen = ImageDraw.Draw(shown)
    cols, rows = result.grid
    boxes = [_scale_box(result.tile_box(k), scale) for k in range(cols * rows)]
    for box in boxes:
        # White around the coloured line: one of the two is seen on any picture.
        if box.left:
            pen.line((box.left, box.top, box.left, box.bottom), fill="white", width=5)
        if box.top:
            pen.line((box.left, box.top, box.right, box.top), fill="white", width=5)
    for box in boxes:
        if box.left:
            pen.line((box.left, box.top, box.left, box.bottom), fill=GRID, width=2)
        if box.top:
            pen.line((box.left, box.top, box.right, box.top), fill=GRID, width=2)
    for k, box in enumerate(boxes):
        _badge(pen, box.left + 8, box.top + 8, str(k + 1))
    return _framed(shown)


def _draw_thumbnail(result: AnyRes) -> Image.Image:
    if result.thumbnail is None:
        return Image.new("RGB", (1, 1), PAPER)
    pixels = Image.fromarray(result.thumbnail)
    scale = THUMBNAIL / pixels.width
    shown = _scaled(pixels, scale if scale < 1 else int(scale))
    _badge(ImageDraw.Draw(shown), 8, 8, str(len(result.tiles)))
    return _framed(shown)


def _scaled(image: Image.Image, scale: float) -> Image.Image:
    size = round(image.width * scale), round(image.height * scale)
    return image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


def _scale_box(box: Box, scale: float) -> Box:
    return Box(*(round(side * scale) for side in (box.left, box.top, box.right, box.bottom)))


def _hatch(image: Image.Image, box: Box) -> None:
    """Diagonal stripes over ``box``; the pixels under them still show."""
    width, height = box.size
    stripes = Image.new("L", (width, height), 30)
    pen = ImageDraw.Draw(stripes)
    for x in range(-height - box.left % 16, width + height, 16):
        pen.line((x, height, x + height, 0), fill=150, width=3)
    image.paste(HATCH, (box.left, box.top, box.right, box.bottom), stripes)


def _badge(pen: ImageDraw.ImageDraw, x: int, y: int, text: str) -> None:
    width = max(26, round(_font(16).getlength(text)) + 14)
    pen.rounded_rectangle((x, y, x + width, y + 24), 6, fill=INK, outline="white", width=2)
    pen.text((x + width / 2, y + 12), text, fill="white", font=_font(16), anchor="mm")


def _framed(image: Image.Image) -> Image.Image:
    framed = Image.new("RGB", (image.width + 2, image.height + 2), RULE)
    framed.paste(image, (1, 1))
    return framed


def _panel(pen: ImageDraw.ImageDraw, page: Image.Image, at: tuple[int, int], title: str, image: Image.Image) -> None:
    _text(pen, at, title, INK, 16)
    page.paste(image, (at[0], at[1] + 30))


def _original_title(result: AnyRes) -> str:
    turned = f", EXIF {result.header.orientation} applied" if result.header.orientation != 1 else ""
    return f"Original {_by((result.header.width, result.header.height))} px{turned}"


def _facts(result: AnyRes) -> list[tuple[str, str]]:
    facts = result.facts()
    grid_tiles = math.prod(facts["grid"])
    return [
        ("size after EXIF", f"{_by((facts['width'], facts['height']))} px"),
        ("grid, columns x rows", _by(facts["grid"])),
        ("fitted", f"{_by(facts['fitted'])} px"),
        ("padding", f"{facts['padding']:.1%}"),
        ("tiles", f"{facts['tiles']}" + (f" = {grid_tiles} + thumbnail" if facts["thumbnail"] else "")),
        ("tokens", f"{facts['tokens']:,} = {facts['tiles']} x {facts['tokens_per_tile']}"),
    ]


def _fact_width(label: str, value: str) -> int:
    return round(max(_font(14).getlength(label), _font(21).getlength(value))) + 30


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _text(pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, color: str, size: int) -> None:
    pen.text(at, text, fill=color, font=_font(size))


def _short(name: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """``name`` cut in its middle to ``width`` pixels; Pillow's own font knows ASCII, the rest is escaped."""
    text = name.encode("ascii", "backslashreplace").decode()
    text = "".join(char if char.isprintable() else "?" for char in text)
    if font.getlength(text) <= width:
        return text
    keep = len(text)
    while keep > 2 and font.getlength(text[: keep // 2] + "..." + text[-(keep // 2) :]) > width:
        keep -= 1
    return text[: keep // 2] + "..." + text[-(keep // 2) :]
