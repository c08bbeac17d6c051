"""The grid rule against a golden table and transformers; arithmetic of tiles and tokens."""

import random

import pytest

from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry

# (width, height) -> grid (columns, rows), fitted size, tokens; 378-pixel tiles up to 4 x 4, alpha 0.1.
GOLDEN = {
    (1, 1): ((1, 1), (378, 378), 196),
    (8, 8): ((1, 1), (378, 378), 196),
    (300, 300): ((1, 1), (378, 378), 196),
    (378, 378): ((1, 1), (378, 378), 196),
    (379, 378): ((1, 1), (378, 378), 196),
    (640, 480): ((2, 2), (756, 567), 980),
    (480, 640): ((2, 2), (567, 756), 980),
    (756, 378): ((2, 1), (756, 378), 588),
    (800, 600): ((3, 2), (1008, 756), 1372),
    (1080, 2400): ((2, 4), (681, 1512), 1764),
    (1170, 2532): ((2, 4), (699, 1512), 1764),
    (1280, 720): ((4, 2), (1344, 756), 1764),
    (1280, 960): ((4, 3), (1512, 1134), 2548),
    (1512, 1512): ((4, 4), (1512, 1512), 3332),
    (1920, 1080): ((4, 3), (1512, 851), 2548),
    (2400, 1080): ((4, 2), (1512, 681), 1764),
    (4032, 3024): ((4, 3), (1512, 1134), 2548),
    (3024, 4032): ((3, 4), (1134, 1512), 2548),
    (20000, 50): ((4, 1), (1512, 4), 980),
    (50, 20000): ((1, 4), (4, 1512), 980),
}


@pytest.mark.parametrize("size", GOLDEN, ids=lambda size: f"{size[0]}x{size[1]}")
def test_golden_table(size):
    geometry = Geometry()
    assert (geometry.grid(*size), geometry.fit(*size), geometry.image_tokens(*size)) == GOLDEN[size]


def test_alpha_zero_is_llava_next():
    from transformers.image_processing_utils import select_best_resolution

    geometry = Geometry(alpha=0.0)
    resolutions = [(rows * geometry.tile, cols * geometry.tile) for cols, rows in geometry.grids]
    rng = random.Random(0)
    for _ in range(5000):
        width, height = (int(2 ** rng.uniform(3, 12)) for _ in range(2))
        best_height, best_width = select_best_resolution((height, width), resolutions)
        assert geometry.grid(width, height) == (best_width // geometry.tile, best_height // geometry.tile), (
            width,
            height,
        )


def test_relaxation_trades_pixels_for_less_waste():
    geometry, strict = Geometry(alpha=0.1), Geometry(alpha=0.0)
    rng = random.Random(1)
    sizes = [(rng.randint(1, 4000), rng.randint(1, 4000)) for _ in range(2000)]
    tiles, strict_tiles = (sum(g.tiles(*size) for size in sizes) for g in (geometry, strict))
    assert 0.9 * strict_tiles < tiles < strict_tiles


def test_fit_stays_inside_and_touches_the_canvas():
    geometry = Geometry(tile=56)
    rng = random.Random(2)
    for _ in range(2000):
        width, height = (int(2 ** rng.uniform(0, 12)) for _ in range(2))
        cols, rows = geometry.grid(width, height)
        fit_width, fit_height = geometry.fit(width, height)
        assert 1 <= fit_width <= cols * 56 and 1 <= fit_height <= rows * 56
        assert fit_width == cols * 56 or fit_height == rows * 56


def test_tokens_and_thumbnail():
    assert Geometry().patches_per_side == 27
    assert Geometry().tokens_per_tile == 196  # 27 x 27 patches padded to 28 x 28, folded 2 x 2
    assert Geometry(tile=56).tokens_per_tile == 4
    assert Geometry().tiles(1512, 1512) == 17
    assert Geometry(thumbnail=False).tiles(1512, 1512) == 16
    assert Geometry().tiles(300, 300) == 1
    assert Geometry(tile=56).grid(8, 8) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tile": 380}, ("tile", "380", "378")),
        ({"patch": 0}, ("patch", "0")),
        ({"alpha": 1.0}, ("alpha", "1.0")),
        ({"max_cols": 0}, ("max_cols",)),
    ],
)
def test_bad_geometry_names_the_key(arguments, words):
    with pytest.raises(UserError) as error:
        Geometry(**arguments)
    assert all(word in str(error.value) for word in words)


def test_no_grid_without_pixels():
    with pytest.raises(UserError, match="0 x 5"):
        Geometry().grid(0, 5)
