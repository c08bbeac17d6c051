"""The ONNX graph of tower and projector computes Megatron's tokens, for any number of tiles."""

import os

import pytest
import torch

from nemo_bluelm.config.schema import geometry_of
from nemo_bluelm.convert import onnx_export
from nemo_bluelm.convert.onnx_export import INPUT, OUTPUT, export_onnx
from nemo_bluelm.errors import UserError
from tests.convert.exports import ODD, write_random

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("run") / "step_00000003", *ODD)


def compare(checkpoint, file) -> None:
    from nemo_bluelm.runtime.single import load_model, single_process_world

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, made.name) == (INPUT, "tensor(uint8)", OUTPUT)
    generator = torch.Generator().manual_seed(0)
    with single_process_world(), torch.inference_mode():
        model, recipe, _ = load_model(checkpoint)
        side = recipe.model.geometry.tile
        assert given.shape[1:] == [3, side, side] and isinstance(given.shape[0], str)
        for count in (1, 2, 5, 17):
            tiles = torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
            wanted = model.projector(model.vision(tiles))
            (found,) = session.run(None, {INPUT: tiles.numpy()})
            assert found.shape == (count, geometry_of(recipe.model).tokens_per_tile, recipe.model.language.hidden_size)
            assert (torch.from_numpy(found) - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max())
            if count > 1:
                assert (wanted[0] - wanted[1]).abs().max() > 1e-2  # tiles differ in what comes out


def test_computes_the_same(checkpoint, tmp_path):
    done = export_onnx(checkpoint, tmp_path / "a" / "vision.onnx")
    assert os.listdir(tmp_path / "a") == ["vision.onnx"]
    assert done.size < (tmp_path / "a" / "vision.onnx").stat().st_size < done.size + 2**20
    compare(checkpoint, tmp_path / "a" / "vision.onnx")


def test_weights_beside_the_graph(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "INLINE_BYTES", 1000)
    done = export_onnx(checkpoint, tmp_path / "vision.onnx")
    assert sorted(os.listdir(tmp_path)) == ["vision.onnx", "vision.onnx.data"]
    assert (tmp_path / "vision.onnx.data").stat().st_size >= 0.9 * done.size
    compare(checkpoint, tmp_path / "vision.onnx")
    with pytest.raises(UserError, match="exists"):
        export_onnx(checkpoint, tmp_path / "vision.onnx")


def test_nothing_half_written(checkpoint, tmp_path, monkeypatch):
    def fill(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.onnx, "export", fill)
    with pytest.raises(UserError, match="No space left"):
        export_onnx(checkpoint, tmp_path / "vision.onnx")
    assert not os.listdir(tmp_path)


def test_refuses_bf16(checkpoint, tmp_path):
    with pytest.raises(UserError, match="float32"):
        export_onnx(checkpoint, tmp_path / "vision.onnx", torch.bfloat16)
