"""Choosing a backend, and one image for a user's prompt."""

import sys

import pytest
import torch
from fault_corpus import encode, fault_corpus, photo

from nemo_bluelm.data.decode import get_backend, load_tiles
from nemo_bluelm.errors import UserError
from nemo_bluelm.geometry import Geometry

TINY = Geometry(tile=56)


@pytest.mark.parametrize(
    ("name", "device", "words"),
    [
        ("tourch", "cpu", "did you mean torch?"),
        ("opencv", "cpu", "there are torch, dali, pil"),
        ("torch", "cuda", "'cuda' is no decode device; there are cpu, gpu"),
        ("torch", "gpu", "take device cpu or backend dali"),
        ("pil", "gpu", "take device cpu or backend dali"),
    ],
)
def test_wrong_choices_are_told_in_one_line(name, device, words):
    with pytest.raises(UserError) as error:
        get_backend(name, device)
    assert words in str(error.value)


def test_dali_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"pip install 'nemo-bluelm\[dali\]'"):
        get_backend("dali")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_dali_without_a_gpu():
    pytest.importorskip("nvidia.dali")
    with pytest.raises(UserError, match="no CUDA device"):
        get_backend("dali", "gpu")


def test_one_image():
    data = encode(photo(), "PNG")
    assert torch.equal(load_tiles(data, TINY), get_backend("pil").tiles([data], TINY)[0])


@pytest.mark.parametrize("kind", ["html", "jpeg-half", "png-bomb", "tiff-32-bit-gray", "1x1-png"])
def test_one_bad_image_is_named(kind):
    with pytest.raises(UserError) as error:
        load_tiles(fault_corpus()[kind].data, TINY, "image 5.0.png")
    assert str(error.value).startswith("image 5.0.png: ") and "\n" not in str(error.value)
