"""``nemo-bluelm export`` and ``verify``: what they print, and mistakes, each one line with nothing left behind."""

import errno
import json
import shutil

import pytest

from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE
from tests.conftest import one_line
from tests.tiny_checkpoint import tiny_checkpoint  # noqa: F401


def rows(checkpoint):
    return Tokenizer.load(checkpoint / TOKENIZER_FILE).vocab_size


def test_prints(cli, tiny_checkpoint, tmp_path):  # noqa: F811
    code, out, err = cli("export", "hf", str(tiny_checkpoint), str(tmp_path / "a"), "--shard-bytes", "300000")
    assert (code, err) == (0, "")
    assert "language (20 tensors)" in out and f"{rows(tiny_checkpoint)} of 2048 rows" in out
    assert (tmp_path / "a" / "model.safetensors.index.json").exists()
    code, out, err = cli("export", "hf", str(tiny_checkpoint), str(tmp_path / "b"), "--dtype", "bfloat16", "--json")
    assert (code, err) == (0, "") and json.loads(out)["vocabulary"] == [2048, rows(tiny_checkpoint)]
    assert not (tmp_path / "b" / "model.safetensors.index.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_verify(cli, tiny_checkpoint, tmp_path):  # noqa: F811
    folder, verdict = tmp_path / "hf", tmp_path / "verdict.json"
    cli("export", "hf", str(tiny_checkpoint), str(folder))
    command = ("verify", str(folder), "--against", str(tiny_checkpoint), "--json", str(verdict))
    code, out, _ = cli(*command)
    assert code == 0 and "all 23 checks agree" in out
    result = json.loads(verdict.read_text())
    assert result["passed"] and len(result["checks"]) == 23 and result["notes"] == []

    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_theta"] = 10000.0
    (folder / "config.json").write_text(json.dumps(config))
    code, out, _ = cli(*command)
    assert code == 1 and "theta 4 is 10000.0, not 1250.0" in out and "checks differ" in out
    assert not json.loads(verdict.read_text())["passed"]


def truncate(checkpoint):
    path = max((checkpoint / "weights").glob("*.distcp"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:1000])


def without_list(checkpoint):
    (checkpoint / "weights" / ".metadata").write_bytes(b"nothing")


def other_shape(checkpoint):
    path = checkpoint / RECIPE_FILE
    path.write_text(path.read_text().replace("num_layers: 2", "num_layers: 3", 1))


def adapters(checkpoint):
    path = checkpoint / RECIPE_FILE
    text = path.read_text()
    assert "rank: 0" in text
    path.write_text(text.replace("rank: 0", "rank: 4", 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, "step_00000001"),
        (without_list, "step_00000001"),
        (other_shape, "lacks vision.blocks.layers.2"),
        (adapters, "merge them with 'nemo-bluelm merge'"),
    ],
)
def test_damaged_checkpoint(cli, tiny_checkpoint, tmp_path, change, message):  # noqa: F811
    checkpoint = tmp_path / "step_00000001"
    shutil.copytree(tiny_checkpoint, checkpoint)
    change(checkpoint)
    code, _, err = cli("export", "hf", str(checkpoint), str(tmp_path / "hf"))
    assert message in one_line(code, err)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


def test_target_exists(cli, tiny_checkpoint, tmp_path):  # noqa: F811
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").touch()
    code, _, err = cli("export", "hf", str(tiny_checkpoint), str(tmp_path / "hf"))
    assert "exists and is not an empty folder" in one_line(code, err)
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["mine"]


def test_disk_full(cli, tiny_checkpoint, tmp_path, monkeypatch):  # noqa: F811
    from nemo_bluelm.convert import exporting

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    code, _, err = cli("export", "hf", str(tiny_checkpoint), str(tmp_path / "hf"))
    assert "0.0 MiB free and the weights take" in one_line(code, err)
    monkeypatch.undo()

    def fill(folder, *_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting, "write_shards", fill)
    code, _, err = cli("export", "hf", str(tiny_checkpoint), str(tmp_path / "hf"))
    assert "No space left on device" in one_line(code, err)
    assert not any(tmp_path.iterdir())


def test_other_mistakes(cli, tiny_checkpoint, tmp_path):  # noqa: F811
    code, _, err = cli("export", "hf", str(tmp_path / "none"), str(tmp_path / "hf"))
    assert "does not exist" in one_line(code, err)
    code, _, err = cli("export", "hf", str(tiny_checkpoint), str(tmp_path / "hf"), "--flavour", "native")
    assert "take exact" in one_line(code, err)
    code, _, err = cli("export", "onnx", str(tiny_checkpoint), str(tmp_path / "v.onnx"), "--flavour", "native")
    assert "leave it out" in one_line(code, err)
    code, _, err = cli("export", "hf", str(tiny_checkpoint), str(tmp_path / "hf"), "--shard-bytes", "0")
    assert "give 1 or more" in one_line(code, err)
    code, _, err = cli("verify", str(tmp_path / "none"), "--against", str(tiny_checkpoint))
    assert "config.json can't be read" in one_line(code, err)


@pytest.mark.parametrize("size", [40, -1])
def test_verify_of_a_damaged_folder(cli, tiny_checkpoint, tmp_path, size):  # noqa: F811
    cli("export", "hf", str(tiny_checkpoint), str(tmp_path / "hf"))
    path = tmp_path / "hf" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    code, _, err = cli("verify", str(tmp_path / "hf"), "--against", str(tiny_checkpoint))
    assert "damaged or cut off" in one_line(code, err)


def test_quantised(cli, tiny_checkpoint, tmp_path):  # noqa: F811
    pytest.importorskip("modelopt")
    (tmp_path / "prompts").write_text("what is seven of nine?\ndescribe the picture\n")
    command = ["export", "hf", str(tiny_checkpoint), str(tmp_path / "fp8"), "--quantise", "fp8"]
    code, out, _ = cli(*command, "--calibration", str(tmp_path / "prompts"), "--json")
    result = json.loads(out)  # nothing else is on the standard output
    assert code == 0 and result["after"] < result["before"] and 0 < result["error"] < 0.5
    assert json.loads((tmp_path / "fp8" / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == "FP8"


@pytest.mark.parametrize(
    "options, told",
    [
        (["hf", "--quantise", "fp8"], "--quantise needs --calibration FILE"),
        (["hf", "--quantise", "fp8", "--calibration", "absent"], "absent can't be read"),
        (["vllm", "--quantise", "fp8", "--calibration", "x"], "--quantise is of 'export hf'"),
        (["hf", "--quantise", "fp8", "--calibration", "x", "--dtype", "float32"], "goes with none of"),
        (["onnx", "--dtype", "bfloat16"], "take --dtype float32"),
    ],
)
def test_options_that_do_not_go_together(options, told, cli, tiny_checkpoint, tmp_path):  # noqa: F811
    code, _, err = cli("export", options[0], str(tiny_checkpoint), str(tmp_path / "out"), *options[1:])
    assert told in one_line(code, err)
    assert not list(tmp_path.iterdir())


def test_onnx_file(cli, tiny_checkpoint, tmp_path):  # noqa: F811
    pytest.importorskip("onnxscript")
    code, out, err = cli("export", "onnx", str(tiny_checkpoint), str(tmp_path / "v.onnx"), "--json")
    assert (code, err) == (0, "") and set(json.loads(out)["tensors"]) == {"vision", "projector"}
    code, _, err = cli("export", "onnx", str(tiny_checkpoint), str(tmp_path / "v.onnx"))
    assert "v.onnx exists; remove it or choose another" in one_line(code, err)
    assert [path.name for path in tmp_path.iterdir()] == ["v.onnx"]
