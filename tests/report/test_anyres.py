"""The AnyRes viewer draws the backend's tiles, each at its place, and says the numbers that training uses."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from nemo_bluelm.data.decode import BadSample, get_backend
from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry
from nemo_bluelm.report.anyres import canvas_scale, draw, view

GEOMETRY = Geometry(tile=56)


def photo(width: int, height: int, orientation: int = 1) -> bytes:
    """A smooth JPEG, red growing to the right and green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([x, y, np.full_like(x, 90)], -1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


class PlainTiles:
    """A backend whose tile k is one plain colour, so that a tile is recognised wherever it is drawn."""

    name = "plain"

    @staticmethod
    def color(k: int) -> tuple[int, int, int]:
        return 40 + 10 * k, 200 - 9 * k, 3 * k

    def tiles(self, images, geometry):
        count = geometry.tiles(*Image.open(io.BytesIO(images[0])).size)
        colors = torch.tensor([self.color(k) for k in range(count)], dtype=torch.uint8)
        return [colors[:, :, None, None].expand(count, 3, geometry.tile, geometry.tile).contiguous()]


def find(picture: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Bounding box (left, top, right, bottom) of a colour in the picture, right and bottom inclusive."""
    rows, columns = np.nonzero((np.asarray(picture) == color).all(-1))
    assert len(rows), f"{color} is not in the picture"
    return columns.min(), rows.min(), columns.max(), rows.max()


@pytest.mark.parametrize("size", [(224, 112), (224, 168), (112, 224), (168, 56)])
def test_tiles_are_drawn_in_the_models_order_at_their_places(size):
    result = view("x.jpg", photo(*size), GEOMETRY, PlainTiles())
    cols, rows = result.grid
    picture = draw(result)
    side = GEOMETRY.tile * canvas_scale((cols * GEOMETRY.tile, rows * GEOMETRY.tile), GEOMETRY.tile)
    first = find(picture, PlainTiles.color(0))
    for k in range(cols * rows):
        left, top, right, bottom = find(picture, PlainTiles.color(k))
        assert abs(left - first[0] - k % cols * side) <= 3 and abs(top - first[1] - k // cols * side) <= 3
        assert side - 6 <= right - left + 1 <= side and side - 6 <= bottom - top + 1 <= side
    thumbnail = find(picture, PlainTiles.color(cols * rows))
    assert thumbnail[2] < first[0]  # beside the canvas, not on it


def test_the_canvas_is_the_image_put_together_again():
    """Against the image itself, resized by Pillow: a tile at a wrong place or turned would be far off."""
    data = photo(200, 120)
    result = view("x.jpg", data, GEOMETRY, get_backend("torch"))
    (width, height), canvas = result.fitted, result.canvas().astype(int)
    assert canvas.shape == (result.grid[1] * 56, result.grid[0] * 56, 3)
    top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
    whole = np.asarray(Image.open(io.BytesIO(data)).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(canvas[top : top + height, left : left + width] - whole).max() <= 16
    for box in result.padding():
        assert not canvas[box.top : box.bottom, box.left : box.right].any()
    covered = sum(box.size[0] * box.size[1] for box in result.padding()) + width * height
    assert covered == canvas.shape[0] * canvas.shape[1]


def test_padding_is_hatched_and_only_padding():
    def hatching(height: int) -> int:
        """Pixels of the stripes' yellow over black; the photo's blue is 90 everywhere."""
        picture = np.asarray(draw(view("x.jpg", photo(224, height), GEOMETRY, get_backend("torch")))).astype(int)
        return int(((picture[..., 0] > 120) & (picture[..., 1] > 100) & (picture[..., 2] < 50)).sum())

    assert hatching(60) > 1000
    assert hatching(224) == 0


def test_facts_of_a_turned_photo():
    """Orientation 6: the stored 240 x 108 pixels are a portrait of 108 x 240."""
    facts = view("x.jpg", photo(240, 108, orientation=6), GEOMETRY, get_backend("torch")).facts()
    assert (facts["width"], facts["height"], facts["orientation"]) == (108, 240, 6)
    assert facts["grid"] == [2, 4]
    assert facts["canvas"] == [112, 224] and facts["fitted"] == [101, 224]
    assert (facts["tiles"], facts["thumbnail"], facts["tokens"]) == (9, True, 36)
    assert facts["padding"] == pytest.approx(1 - 101 / 112, abs=1e-4)


def test_the_original_is_upright():
    """Red grows downwards after the turn, so the top of the drawn original is darker in red than its bottom."""
    result = view("x.jpg", photo(240, 108, orientation=6), GEOMETRY, PlainTiles6())
    picture = np.asarray(draw(result)).astype(int)
    column = picture[150:350, 90]
    assert column[-1, 0] - column[0, 0] > 60


class PlainTiles6(PlainTiles):
    def tiles(self, images, geometry):
        return [torch.zeros(geometry.tiles(108, 240), 3, geometry.tile, geometry.tile, dtype=torch.uint8)]


def test_one_tile_has_no_thumbnail():
    result = view("x.jpg", photo(30, 30), GEOMETRY, get_backend("torch"))
    assert result.thumbnail is None and result.facts()["tokens"] == 4
    draw(result)


@pytest.mark.parametrize("size", [(1600, 17), (17, 1600), (8, 8), (1512, 1512)])
def test_extreme_sizes_make_a_picture_one_can_look_at(size):
    picture = draw(view("x.jpg", photo(*size), Geometry(), get_backend("torch")))
    assert 700 <= picture.width <= 1500 and 400 <= picture.height <= 1400


def test_names_pillow_cannot_draw_are_escaped():
    draw(view("\u7167\u7247\n" + "x" * 300 + ".jpg", photo(30, 30), GEOMETRY, get_backend("torch")))


def test_bad_images_are_one_line_that_names_them():
    with pytest.raises(UserError, match="^no.jpg: not an image"):
        view("no.jpg", b"hello", GEOMETRY, get_backend("torch"))
    with pytest.raises(UserError, match="^cut.jpg: "):
        view("cut.jpg", photo(200, 200)[:900], GEOMETRY, get_backend("torch"))


def test_a_backends_reason_is_passed_on():
    class Refusing(PlainTiles):
        def tiles(self, images, geometry):
            return [BadSample("the scan is broken")]

    with pytest.raises(UserError, match="x.jpg: the scan is broken"):
        view("x.jpg", photo(30, 30), GEOMETRY, Refusing())
