"""``nemo-bluelm import``: what it prints, and its mistakes, each one line with nothing left behind."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import one_line
from tests.convert.conftest import language_folder, save_language, save_vision  # noqa: F401

INDEX = "model.safetensors.index.json"


def test_prints(cli, language_folder, tmp_path):  # noqa: F811
    code, out, err = cli("import", "hf", str(language_folder), str(tmp_path / "ckpt"))
    assert (code, err) == (0, "")
    assert "language (30 tensors)" in out and "300 rows there, 384 here" in out
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == ["recipe.yaml", "tokenizer.json", "weights"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "llama"]

    code, out, err = cli("import", "hf", str(language_folder), str(tmp_path / "b"), "--json", "--recipe", "tiny/sft")
    assert (code, err) == (0, "") and json.loads(out)["replaced"]["model.language.num_layers"] == [2, 3]


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_shard(folder, change):
    """Apply ``change`` to the tensors of the last shard."""
    path = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def first(tensors):
    return sorted(tensors)[0]


def cut(folder, size):
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:size])


def overwrite(folder):
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def drop(folder):
    change_shard(folder, lambda tensors: tensors.pop(first(tensors)))


def drop_everywhere(folder):
    drop(folder)
    index = json.loads((folder / INDEX).read_text())
    shards = [load_file(path).keys() for path in folder.glob("*.safetensors")]
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if any(k in names for names in shards)}
    (folder / INDEX).write_text(json.dumps(index))


def spoil(folder):
    def change(tensors):
        tensors[first(tensors)].view(-1)[3] = float("nan")

    change_shard(folder, change)


def to_int8(folder):
    def change(tensors):
        tensors[first(tensors)] = tensors[first(tensors)].to(torch.int8)

    change_shard(folder, change)


MISTAKES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json can't be read: No such file"),
    "no json": (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
    "no object": (lambda folder: (folder / "config.json").write_text("[]"), "is no JSON object"),
    "value": (lambda folder: change_config(folder, num_attention_heads="six"), "sizes that no model has"),
    "heads": (lambda folder: change_config(folder, num_key_value_heads=4), "heads don't divide"),
    "no number": (lambda folder: change_config(folder, hidden_size=None), "config.json"),
    "architecture": (lambda folder: change_config(folder, model_type="gpt2"), "model_type 'gpt2'"),
    "norms": (lambda folder: change_config(folder, model_type="qwen3"), "lacks model.layers.0.self_attn.k_norm.weight"),
    "window": (
        lambda folder: change_config(folder, model_type="qwen3", use_sliding_window=True, sliding_window=64),
        "has sliding_window 64",
    ),
    "qwen2": (lambda folder: change_config(folder, model_type="qwen2"), "attention has biases"),
    "biases": (lambda folder: change_config(folder, attention_bias=True), "attention_bias True"),
    "activation": (lambda folder: change_config(folder, hidden_act="gelu"), "hidden_act 'gelu'"),
    "rope": (
        lambda folder: change_config(folder, rope_scaling={"rope_type": "linear", "factor": 2.0}),
        "rope_type 'linear'",
    ),
    "theta": (lambda folder: change_config(folder, rope_theta=1e4 + 0.5), "rope_theta 10000.5"),
    "shape": (lambda folder: change_config(folder, intermediate_size=225), "is 224 x 96, and by config.json it is 225"),
    "layers": (lambda folder: change_config(folder, num_hidden_layers=4), "lacks model.layers.3."),
    "more layers": (lambda folder: change_config(folder, num_hidden_layers=2), "has no place in our model"),
    "cut": (lambda folder: cut(folder, 5000), "is damaged or cut off"),
    "cut header": (lambda folder: cut(folder, 5), "is damaged or cut off"),
    "empty": (lambda folder: cut(folder, 0), "is damaged or cut off"),
    "overwritten": (overwrite, "is damaged or cut off"),
    "no shard": (lambda folder: sorted(folder.glob("*.safetensors"))[-1].unlink(), "can't be read"),
    "no weights": (lambda folder: (folder / INDEX).unlink(), "has neither model.safetensors nor"),
    "index": (lambda folder: (folder / INDEX).write_text("{}"), "has no weight_map"),
    "lost key": (drop, "which model.safetensors.index.json says it has"),
    "missing key": (drop_everywhere, "lacks "),
    "not finite": (spoil, "not finite"),
    "quantised": (to_int8, "is I8"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json can't be read"),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is not a tokenizer.json"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(cli, language_folder, tmp_path, mistake):  # noqa: F811
    spoil_folder, message = MISTAKES[mistake]
    spoil_folder(language_folder)
    code, out, err = cli("import", "hf", str(language_folder), str(tmp_path / "ckpt"))
    assert out == "" and message in one_line(code, err)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_target_exists(cli, language_folder, tmp_path):  # noqa: F811
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "mine").write_text("kept")
    code, _, err = cli("import", "hf", str(language_folder), str(tmp_path / "ckpt"))
    assert "exists and is not an empty folder" in one_line(code, err)
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["mine"]


def test_disk_full(tmp_path):
    """A limit on the size of files stops the writer as a full disk does, in the middle of the weights."""
    save_language(tmp_path / "llama")
    folders = [str(tmp_path / name) for name in ("llama", "c")]
    command = [sys.executable, "-m", "nemo_bluelm.cli.main", "import", "hf", *folders]
    limited = ["bash", "-c", 'ulimit -f 200; exec "$@"', "bash", *command]
    ended = subprocess.run(limited, capture_output=True, text=True, timeout=120)
    assert "can't be written" in one_line(ended.returncode, ended.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_too_little_room(cli, language_folder, tmp_path, monkeypatch):  # noqa: F811
    from nemo_bluelm.convert import importing

    usage = importing.shutil._ntuple_diskusage(2**20, 2**20, 0)
    monkeypatch.setattr(importing.shutil, "disk_usage", lambda path: usage)
    code, _, err = cli("import", "hf", str(language_folder), str(tmp_path / "ckpt"))
    assert "has 0.0 MiB free" in one_line(code, err)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_vision_of_another_activation(cli, tmp_path):
    save_vision(tmp_path / "siglip", both=False)
    change_config(tmp_path / "siglip", hidden_act="quick_gelu")
    code, _, err = cli("import", "hf", str(tmp_path / "siglip"), str(tmp_path / "ckpt"))
    assert "hidden_act 'quick_gelu'" in one_line(code, err)
