"""``nemo-bluelm bench``: what it measures, and its mistakes."""

import importlib.util
import json
import re

import pytest
import torch

from nemo_bluelm.bench.images import SIZES, make_images
from nemo_bluelm.bench.peers import peers
from nemo_bluelm.geometry import Geometry
from tests.conftest import one_line


@pytest.mark.slow
def test_loader_in_one_run(cli, tmp_path):
    out = tmp_path / "result.json"
    options = ("--backends", "torch,pil", "--images", "4", "--rounds", "2", "--threads", "2")
    code, text, _ = cli("bench", "loader", *options, "--json", "--out", str(out))
    report = json.loads(text)
    assert code == 0 and json.loads(out.read_text()) == report
    paths = {row["name"]: row for row in report["paths"]}
    assert {"torch", "pil", "hf slow"} <= paths.keys()
    assert ("hf fast" in paths) == (importlib.util.find_spec("torchvision") is not None)
    assert len({row["tiles"] for row in paths.values()}) == 1  # the same work for all
    for row in paths.values():
        cpu = row["cpu_ms"]
        assert 0 < cpu["min"] <= cpu["median"] <= cpu["max"] and row["images_per_s"] > 0
        assert len(row["rounds"]) == 2
    assert paths["hf slow"]["ratio"]["hf slow"] == 1
    assert paths["pil"]["parity"] == {"max": 0, "mean": 0}
    assert 0 < paths["torch"]["parity"]["mean"] <= 0.25 and paths["torch"]["parity"]["max"] <= 16
    assert report["settings"]["images"] == 4 and report["versions"]["torch"] and report["machine"]["cores"]


def test_missing_torchvision_is_told(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchvision" else find_spec(name, *rest)
    )
    found, notes = peers(Geometry())
    assert list(found) == ["hf slow"]
    assert len(notes) == 1 and re.search(r"pip install --no-deps --target DIR torchvision==0\.\d+\.\d+,", notes[0])


def test_images_are_the_same_every_time():
    from io import BytesIO

    from PIL import Image

    images = make_images(4)
    assert images == make_images(4)
    assert [Image.open(BytesIO(data)).size for data in images] == list(SIZES)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "COMMAND"),
        (("lodaer",), "lodaer"),
        (("loader", "--images", "0"), "--images"),
        (("loader", "--images", "1", "--backends", "tourch"), "did you mean torch"),
        (("loader", "--backends", " ,"), "names none"),
        (("loader", "--out", "no/such/folder/x.json"), "the folder no/such/folder does not exist"),
        pytest.param(
            ("loader", "--images", "1", "--device", "gpu"),
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device"),
        ),
        (("loader", "--folder", "nowhere"), "nowhere has no .jpg files"),
    ],
)
def test_mistakes(cli, argv, words):
    code, _, stderr = cli("bench", *argv)
    assert words in one_line(code, stderr)
