"""Quantised folders: what is in which format, what they compute, and that they answer."""

import pytest
import torch

from nemo_bluelm.convert.quantise import EXCLUDED, QUANT_FILE, Kind, dequantised, quantise
from nemo_bluelm.convert.shards import WEIGHTS, read_json
from nemo_bluelm.errors import UserError
from tests.convert.exports import TEXTS, write_random

pytest.importorskip("modelopt")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("run") / "step_00000003")


@pytest.mark.parametrize("kind, dtype, limit", [(Kind.fp8, "F8_E4M3", 0.2), (Kind.int4_awq, "U8", 0.6)])
def test_quantises(checkpoint, tmp_path, kind, dtype, limit):
    from safetensors import safe_open

    (tmp_path / "prompts").write_text("\n".join(TEXTS[0].split(" ")))
    done = quantise(checkpoint, tmp_path / "out", kind, tmp_path / "prompts")
    print(kind, done)
    with safe_open(tmp_path / "out" / WEIGHTS, "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}
    linears = {name for name in kinds if "language_model.layers" in name and name.endswith("proj.weight")}
    assert linears and {kinds[name] for name in linears} == {dtype}
    others = {kind for name, kind in kinds.items() if name not in linears and not name.endswith("_scale")}
    assert others == {"BF16"}
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert read_json(tmp_path / "out" / QUANT_FILE)["quantization"]["exclude_modules"] == list(EXCLUDED)
    assert config["quant_method"] == "modelopt" and config["ignore"] == list(EXCLUDED)
    assert done.after < done.before and 0 < done.stored < limit and 0 < done.error < limit
    model = dequantised(tmp_path / "out")
    tokens = torch.tensor([[5, 6, 7]])
    assert model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4).size(1) > 3


def test_no_prompts(checkpoint, tmp_path):
    (tmp_path / "prompts").write_text("\n")
    with pytest.raises(UserError, match="no prompts"):
        quantise(checkpoint, tmp_path / "out", Kind.fp8, tmp_path / "prompts")
    assert not (tmp_path / "out").exists()


def test_sizes_that_int4_can_not_take(tmp_path):
    other = write_random(tmp_path / "step_00000001", "model.language.ffn_hidden_size=320")
    (tmp_path / "prompts").write_text("one\n")
    with pytest.raises(UserError, match="ffn_hidden_size is 320, and INT4 takes groups of 128 .*--quantise fp8"):
        quantise(other, tmp_path / "out", Kind.int4_awq, tmp_path / "prompts")
    assert not (tmp_path / "out").exists()
