"""On a GPU: DALI's tiles beside Pillow's, its verdicts on broken files, its memory."""

import numpy as np
import pytest
import torch

from nemo_bluelm.data.decode import BadSample, get_backend
from nemo_bluelm.geometry import Geometry
from tests.data.fault_corpus import encode, fault_corpus, photo

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TINY, FULL = Geometry(tile=56), Geometry()
SIZES = [(640, 480), (1280, 960), (1920, 1080), (1080, 2400)]
CORPUS = fault_corpus()


@pytest.fixture(scope="module")
def dali():
    pytest.importorskip("nvidia.dali")
    return get_backend("dali", "gpu", threads=4)


@pytest.fixture(scope="module")
def pil():
    return get_backend("pil", threads=4)


def levels(tiles, expected):
    assert tiles.is_cuda and tiles.dtype == torch.uint8 and tiles.is_contiguous()
    assert tiles.shape == expected.shape
    return (tiles.cpu().int() - expected.int()).abs().float()


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_photos_agree_with_pillow(dali, pil, form):
    options = {"quality": 88} if form == "JPEG" else {}
    files = [encode(photo("RGB", *size), form, **options) for size in SIZES]
    for size, tiles, expected in zip(SIZES, dali.tiles(files, FULL), pil.tiles(files, FULL)):
        off = levels(tiles, expected)
        far = float((off > 16).float().mean())
        print(f"{form} {size}: largest {off.max():.0f}, mean {off.mean():.3f}, {far:.1e} of them above 16")
        if form == "PNG":  # Pillow decodes, only the resize is the GPU's
            assert off.max() <= 16 and off.mean() <= 0.25
        else:  # the GPU decodes with an inverse DCT and a chroma upsampling of its own
            assert far <= 1e-3 and off.mean() <= 1


@pytest.mark.parametrize("kind", CORPUS)
def test_each_kind_between_good_neighbours(dali, pil, kind):
    neighbours = [encode(photo("RGB", 120, 90), "JPEG"), encode(photo("RGB", 90, 40), "PNG")]
    first, result, last = dali.tiles([neighbours[0], CORPUS[kind].data, neighbours[1]], TINY)
    alone = [dali.tiles([data], TINY)[0] for data in neighbours]
    assert torch.equal(last, alone[1])
    assert levels(first, alone[0].cpu()).max() <= 4  # the decoder may take another path in another batch
    if not CORPUS[kind].good:
        assert isinstance(result, BadSample) and "\n" not in result.reason
        return
    (expected,) = pil.tiles([CORPUS[kind].data], TINY)
    assert not isinstance(result, BadSample), result
    if kind != "jpeg-cut-but-ended":  # what is missing is anyone's guess
        assert levels(result, expected).mean() <= (4 if "flips" in kind or "quality-1" in kind else 2)


def test_a_failing_batch_is_halved(dali):
    good, bad = encode(photo("RGB", 120, 90), "JPEG"), CORPUS["jpeg-broken-huffman-table"].data
    results = dali.tiles([good] * 6 + [bad] + [good] * 6, TINY)
    assert [isinstance(result, BadSample) for result in results] == [False] * 6 + [True] + [False] * 6
    assert all(levels(result, results[0].cpu()).max() <= 2 for result in results if torch.is_tensor(result))


def test_memory_does_not_grow(dali):
    files = [encode(photo("RGB", *size), "JPEG") for size in SIZES] * 4
    free = []
    for _ in range(30):
        dali.tiles(files, FULL)
        torch.cuda.synchronize()
        free.append(torch.cuda.mem_get_info()[0] / 2**20)
    print("free MiB", np.round(free[::5]))
    assert free[9] - free[-1] <= 64


def test_tiles_stay_what_they_are(dali):
    """Later batches don't write into memory that was handed out, nor into what queued kernels still read."""
    files = [encode(photo("RGB", *size), "JPEG") for size in SIZES]
    expected = [tiles.cpu() for tiles in dali.tiles(files, FULL)]
    sums = []
    for _ in range(8):
        torch.cuda._sleep(50_000_000)  # the GPU lags behind the host
        sums.append([tiles.long().sum() for tiles in dali.tiles(files, FULL)])
    totals = [int(tiles.long().sum()) for tiles in expected]
    for row in sums:
        assert [int(total) for total in row] == pytest.approx(totals, rel=1e-3)
