"""Pixels and policies of the three backends beside an independent Pillow reference."""

import numpy as np
import pil_tiles
import pytest
import torch
from fault_corpus import encode, exif, fault_corpus, png16, sixteen
from PIL import Image
from sklearn.datasets import load_sample_image

from nemo_bluelm.data.decode import BACKENDS, get_backend
from nemo_bluelm.geometry import Geometry

TINY, FULL = Geometry(tile=56), Geometry()
GOOD = {kind: case.data for kind, case in fault_corpus().items() if case.good}


def china(width, height):
    return Image.fromarray(load_sample_image("china.jpg")).resize((width, height))


PHOTOS = {
    "one-tile": (encode(china(300, 280), "PNG"), FULL),
    "exact-tile": (encode(china(378, 378), "PNG"), FULL),
    "photo": (encode(china(640, 427), "JPEG", quality=90), FULL),
    "large": (encode(china(1500, 1100), "JPEG", quality=85), FULL),
    "screen": (encode(china(1080, 2400), "JPEG", quality=88), FULL),
    "wide": (encode(china(400, 30), "JPEG"), TINY),
    "tall": (encode(china(20, 700), "JPEG"), TINY),
    "turned": (encode(china(500, 200), "JPEG", 6, quality=95), TINY),
    "no-thumbnail": (encode(china(500, 200), "JPEG"), Geometry(tile=56, thumbnail=False)),
}


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return get_backend(request.param)


def reference(data, geometry):
    grid = geometry.grid(*pil_tiles.decode(data).size)
    return pil_tiles.tiles(data, grid, geometry.tile, geometry.thumbnail)


def one(backend, data, geometry=TINY):
    (tiles,) = backend.tiles([data], geometry)
    return tiles


def difference(backend, data, geometry):
    """(largest, mean) in levels of 255."""
    tiles, expected = one(backend, data, geometry), reference(data, geometry)
    assert tiles.dtype == torch.uint8 and tiles.is_contiguous() and tiles.device.type == "cpu"
    assert tiles.shape == expected.shape
    levels = np.abs(tiles.numpy().astype(int) - expected)
    return levels.max(), levels.mean()


@pytest.mark.parametrize("case", PHOTOS)
def test_photos_agree_with_pillow(backend, case):
    largest, mean = difference(backend, *PHOTOS[case])
    if backend.name == "pil":
        assert largest == 0
    assert largest <= 16 and mean <= 0.25


@pytest.mark.parametrize("kind", GOOD)
def test_every_kind_agrees_with_pillow(backend, kind):
    """Orientation, alpha, 16 bits, palettes and colour models are read alike, whichever decoder does it."""
    largest, mean = difference(backend, GOOD[kind], TINY)
    if backend.name == "pil":
        assert largest == 0
    # A digit of 8 pixels grows sevenfold, where DALI's table of filter weights is coarser than Pillow's.
    assert largest <= 16 and mean <= (1 if kind == "8x8" else 0.25)


def test_order_of_tiles_and_margin(backend):
    """Two colours in a 2 x 1 image: left tile, right tile, thumbnail last."""
    pixels = np.zeros((56, 112, 3), np.uint8)
    pixels[:, :56], pixels[:, 56:] = (255, 0, 0), (0, 0, 255)
    left, right, thumbnail = one(backend, encode(Image.fromarray(pixels), "PNG"))
    assert left[0].min() == 255 and right[2].min() == 255 and left[2].max() == right[0].max() == 0
    assert thumbnail[0, 0, 0] == 255 and thumbnail[2, 0, -1] == 255
    (tile,) = one(backend, encode(Image.new("RGB", (40, 20), (200, 200, 200)), "PNG"))
    assert (tile[:, 14:42] == 200).all() and tile[:, :14].max() == 0 and tile[:, 42:].max() == 0


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "JPEG2000"])
def test_alpha_is_dropped_not_composited(backend, form):
    image = Image.new("RGBA", (56, 56), (90, 90, 90, 0))
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    assert (one(backend, encode(image, form, **options)) == 90).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_are_scaled_not_clipped(backend, channels):
    pixels = np.full((56, 56, channels), 0x8000, np.uint16)
    assert (one(backend, png16(pixels)) == 128).all()
    assert one(backend, png16(sixteen(channels)), FULL).float().std() > 10


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_is_applied(backend, form, turn):
    """The picture that a viewer would show has a red top left corner, whatever the file stores."""
    shown = Image.new("RGB", (112, 56), (0, 0, 255))
    shown.paste((255, 0, 0), (0, 0, 40, 24))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that the orientation's undoes
    stored = shown.transpose(Image.Transpose(undo[turn])) if turn > 1 else shown
    data = encode(stored, form, exif=exif(turn), **({"quality": 95} if form in ("JPEG", "WEBP") else {}))
    tiles = one(backend, data)
    assert len(tiles) == 3
    corners = [tiles[0, 0, 8, 8], tiles[0, 0, 48, 8], tiles[1, 0, 8, 48], tiles[1, 0, 48, 48]]
    assert [int(corner) > 128 for corner in corners] == [True, False, False, False]


def test_the_batch_does_not_matter(backend):
    files = [data for data, _ in PHOTOS.values()]
    alone = [one(backend, data) for data in files]
    for together in (backend.tiles(files, TINY), backend.tiles(files[::-1], TINY)[::-1]):
        assert all(torch.equal(a, b) for a, b in zip(together, alone))
    assert backend.tiles([], TINY) == []


def test_more_images_than_a_batch_holds(backend):
    small = [encode(china(60 + i, 60), "JPEG") for i in range(3)]
    alone = [one(backend, data) for data in small]
    results = backend.tiles(small * 50, TINY)
    assert len(results) == 150
    assert all(torch.equal(result, alone[i % 3]) for i, result in enumerate(results))


def test_the_number_of_threads_does_not_matter(backend):
    files = [data for data, _ in PHOTOS.values()] + [GOOD["png"], GOOD["webp"]]
    several = get_backend(backend.name, threads=3)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(several.tiles(files, TINY), backend.tiles(files, TINY)))


def test_calls_from_several_threads(backend):
    from concurrent.futures import ThreadPoolExecutor

    files = [data for data, _ in PHOTOS.values()]
    expected = backend.tiles(files, TINY)
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: backend.tiles(files, TINY), range(8)):
            assert all(torch.equal(a, b) for a, b in zip(results, expected))


def test_tiles_stay_what_they_are(backend):
    """Memory that a backend hands out is not written again."""
    first = one(backend, PHOTOS["photo"][0])
    copy = first.clone()
    for case in ("large", "screen", "turned"):
        one(backend, PHOTOS[case][0])
    assert torch.equal(first, copy)
