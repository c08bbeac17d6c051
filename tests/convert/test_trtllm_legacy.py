"""A legacy TensorRT-LLM checkpoint is what Megatron-Core's own converter makes of the same model."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from nemo_bluelm.convert.trtllm_legacy import export_legacy
from nemo_bluelm.errors import UserError
from nemo_bluelm.generate.generator import open_generator
from tests.convert.exports import write_random

PLAIN = ("model.language.yarn.factor=1",)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(request, tmp_path_factory):
    tied = f"model.language.share_embeddings_and_output_weights={str(request.param).lower()}"
    return write_random(tmp_path_factory.mktemp("run") / "step_00000003", *PLAIN, tied)


def by_megatron(checkpoint, tensor, monkeypatch):
    import megatron.core.export.trtllm.trtllm_weights_converter.single_device_trtllm_model_weights_converter as module
    from megatron.core.export.data_type import DataType
    from megatron.core.export.export_config import ExportConfig
    from megatron.core.export.trtllm.model_to_trllm_mapping.default_conversion_dict import DEFAULT_CONVERSION_DICT

    monkeypatch.setattr(module, "str_dtype_to_torch", lambda dtype: torch.float32, raising=False)
    monkeypatch.setattr(module, "pad_vocab_size", lambda rows, ranks: -(-rows // ranks) * ranks, raising=False)
    with open_generator(checkpoint) as generator:
        model, rows = generator.model.language, generator.tokenizer.vocab_size
        state = {name: tensor.clone() for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}
        config = SimpleNamespace(**{key: getattr(model.config, key) for key in ("num_query_groups", "num_layers")})
        config.num_attention_heads, config.kv_channels = model.config.num_attention_heads, model.config.kv_channels
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in state:
            state[name] = state[name][:rows]
    state.setdefault("output_layer.weight", state["embedding.word_embeddings.weight"].clone())
    config.layernorm_zero_centered_gamma, config.normalization, config.gated_linear_unit = False, "RMSNorm", True
    converter = module.SingleDeviceTRTLLMModelWeightsConverter(
        ExportConfig(inference_tp_size=tensor, inference_pp_size=1), config, DataType.float32, activation="swiglu"
    )
    converter.convert(state, DEFAULT_CONVERSION_DICT)
    for rank in range(tensor):
        mapping = SimpleNamespace(
            tp_size=tensor,
            tp_rank=rank,
            pp_layers=range,
            is_first_pp_rank=lambda: True,
            is_last_pp_rank=lambda: True,
        )
        yield converter.get_local_model_weights_per_gpu(mapping, SimpleNamespace(use_parallel_embedding=False))


@pytest.mark.parametrize("tensor", [1, 2])
def test_is_megatrons(checkpoint, tmp_path, monkeypatch, tensor):
    export_legacy(checkpoint, tmp_path / "out", tensor, torch.float32)
    expected = list(by_megatron(checkpoint, tensor, monkeypatch))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mapping"] == {"world_size": tensor, "tp_size": tensor, "pp_size": 1}
    assert config["position_embedding_type"] == "rope_gpt_neox" and config["rotary_scaling"] is None
    files = [f"rank{rank}.safetensors" for rank in range(tensor)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", *files]
    for file, theirs in zip(files, expected, strict=True):
        weights = load_file(tmp_path / "out" / file)
        assert set(weights) == set(theirs)
        for name, weight in weights.items():
            assert torch.equal(weight, theirs[name]), name


def test_fewer_groups_than_ranks(tmp_path):
    """Two ranks share a group's keys and values, and have queries of their own."""
    checkpoint = write_random(tmp_path / "step_00000001", *PLAIN, "model.language.num_query_groups=1")
    export_legacy(checkpoint, tmp_path / "one", 1)
    export_legacy(checkpoint, tmp_path / "two", 2)
    name = "transformer.layers.0.attention.qkv.weight"
    (whole,), parts = (
        [load_file(tmp_path / folder / f"rank{rank}.safetensors")[name] for rank in range(count)]
        for folder, count in (("one", 1), ("two", 2))
    )
    head = json.loads((tmp_path / "one" / "config.json").read_text())["head_size"]
    queries, shared = whole[: -2 * head], whole[-2 * head :]
    for part, own in zip(parts, queries.chunk(2)):
        assert torch.equal(part, torch.cat([own, shared]))


def test_refuses(tmp_path):
    checkpoint = write_random(tmp_path / "step_00000001")
    with pytest.raises(UserError, match="has no YaRN"):
        export_legacy(checkpoint, tmp_path / "out")
    plain = write_random(tmp_path / "step_00000002", *PLAIN)
    with pytest.raises(UserError, match="3 ranks don't divide"):
        export_legacy(plain, tmp_path / "out", 3)
    normed = write_random(tmp_path / "step_00000003", *PLAIN, "model.language.qk_layernorm=true")
    with pytest.raises(UserError, match="doesn't norm queries and keys"):
        export_legacy(normed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(cli, checkpoint, tmp_path):
    out = tmp_path / "out"
    code, text, err = cli("export", "trtllm", str(checkpoint), str(out), "--legacy", "--tensor", "2", "--json")
    assert (code, err) == (0, "") and json.loads(text) == {"folder": str(out), "ranks": 2}
    assert (out / "rank1.safetensors").is_file()
    code, _, err = cli("export", "hf", str(checkpoint), str(tmp_path / "b"), "--legacy")
    assert code == 2 and "--legacy is TensorRT-LLM's" in err and err.count("\n") == 1
