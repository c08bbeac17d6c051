"""The TensorRT-LLM folder: contracts against a stand-in of its interfaces, and what of it runs on torch alone."""

import base64
import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nemo_bluelm.convert.engines import export_trtllm
from nemo_bluelm.convert.golden import NEW_TOKENS
from nemo_bluelm.convert.trtllm.verify_trtllm import compare
from nemo_bluelm.data.decode import load_tiles
from nemo_bluelm.errors import UserError
from nemo_bluelm.generate.generator import open_generator
from tests.convert.exports import ODD, write_random

FAKE = Path(__file__).with_name("fake_trtllm")
GENERATIONS = ("1.2", "main")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("run") / "step_00000003", *ODD)


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "trtllm"
    export_trtllm(checkpoint, out)
    return out


@pytest.fixture(scope="module")
def golden(folder):
    return json.loads((folder / "golden.json").read_text())


@contextlib.contextmanager
def plugin(folder, generation):
    """The folder's package, imported as a server does, where TensorRT-LLM is of ``generation``."""
    before, path = set(sys.modules), list(sys.path)
    sys.path[:0] = [str(folder), str(FAKE)]
    os.environ["FAKE_TRTLLM"] = generation
    try:
        yield importlib.import_module("bluelm_trtllm"), importlib.import_module("tensorrt_llm")
    finally:
        sys.path[:] = path
        del os.environ["FAKE_TRTLLM"]
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("bluelm_trtllm", "tensorrt_llm"):
                del sys.modules[name]


@pytest.fixture
def parts(folder):
    with plugin(folder, "main"):
        yield importlib.import_module("bluelm_trtllm.parts")


def images_of(case):
    return [Image.open(io.BytesIO(base64.b64decode(image))) for image in case["images"]]


def config_of(folder):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=True)


def processor_of(package, folder):
    return package.BlueLMVLInputProcessor(str(folder), config_of(folder), None, trust_remote_code=True)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_registers(folder, generation):
    with plugin(folder, generation) as (package, trtllm):
        config = config_of(folder)
        model = trtllm.REGISTERED.models[config.architectures[0]]
        assert model is package.BlueLMVLModel
        assert trtllm.REGISTERED.processors[model] is package.BlueLMVLInputProcessor
        placeholders = trtllm.REGISTERED.placeholders[config.model_type]
        assert placeholders.placeholder_map == {"image": "<image>"} and placeholders.placeholders_separator == ""
        assert placeholders.placeholder_placement is trtllm.MultimodalPlaceholderPlacement.BEFORE_TEXT
        if generation == "main":
            assert placeholders.content_format is trtllm.ContentFormat.OPENAI


@pytest.mark.parametrize("generation", GENERATIONS)
def test_reads_prompts(folder, golden, generation):
    with plugin(folder, generation) as (package, _):
        processor = processor_of(package, folder)
        for case in golden["cases"]:
            images = images_of(case)
            given = {"prompt": case["prompt"], **({"multi_modal_data": {"image": images}} if images else {})}
            tokens, extra = processor(given, None)
            assert tokens == case["prompt_tokens"]
            if not images:
                assert extra is None
                continue
            image = extra["multimodal_data"]["image"]
            assert image["num_patches"] == [case["tiles"]] and len(image["pixel_values"]) == case["tiles"]
            assert image["pixel_values"].dtype == processor.dtype
            (token,) = processor.get_mm_token_ids().tolist()
            assert token == golden["image_token"]
            assert processor.get_num_tokens_per_image(image=images[0]) == tokens.count(token)
        assert processor.get_vocab_size() > max(max(case["prompt_tokens"]) for case in golden["cases"])
        with pytest.raises(ValueError, match="not video"):
            processor({"prompt": "", "multi_modal_data": {"video": []}}, None)


def test_images_of_servers(folder, golden):
    """Servers load images as Pillow's, as arrays or as floats; the pixels are the same."""
    import numpy as np

    (image,), prompt = images_of(golden["cases"][2]), golden["cases"][2]["prompt"]
    array = np.asarray(image.convert("RGB"))
    floats = torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255
    with plugin(folder, "main") as (package, _):
        processor = processor_of(package, folder)
        made = []
        for one in (image, array, floats):
            _, extra = processor({"prompt": prompt, "multi_modal_data": {"image": [one]}}, None)
            made.append(extra["multimodal_data"]["image"]["pixel_values"])
            assert processor.get_num_tokens_per_image(image=one) == processor.get_num_tokens_per_image(image=image)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


@pytest.mark.parametrize("generation", GENERATIONS)
def test_computes(folder, golden, generation):
    """By the stand-in's SigLIP and Llama, the model's next token is the checkpoint's; weights are all used."""
    with plugin(folder, generation) as (package, trtllm), torch.inference_mode():
        config = config_of(folder)
        model = package.BlueLMVLModel(trtllm.ModelConfig(config))
        model.load_weights(load_file(folder / "model.safetensors"), weight_mapper=None)
        assert model.config is model.llm.config is model.model_config.pretrained_config
        assert model.infer_max_seq_len() == config.text_config.max_position_embeddings
        processor = processor_of(package, folder)
        for case in golden["cases"]:
            given = {"prompt": case["prompt"], "multi_modal_data": {"image": images_of(case)}}
            tokens, extra = processor(given, None)
            params = [SimpleNamespace(multimodal_data=extra["multimodal_data"])] if extra else []
            logits = model(
                SimpleNamespace(num_contexts=1),
                input_ids=torch.tensor(tokens),
                position_ids=torch.arange(len(tokens)),
                multimodal_params=params,
            )
            value, token = logits[-1].log_softmax(-1).max(-1)
            assert token.item() == case["tokens"][0]
            assert value.item() == pytest.approx(case["logprobs"][0], abs=1e-4)


def test_projector_is_ours(checkpoint, folder, parts):
    config = json.loads((folder / "config.json").read_text())
    channels, hidden = config["vision_config"]["hidden_size"], config["text_config"]["hidden_size"]
    projector = parts.Projector(channels, hidden, config["downsample_factor"])
    projector.load_state_dict(parts.split_weights(load_file(folder / "model.safetensors"))[1])
    with open_generator(checkpoint) as generator, torch.inference_mode():
        side = generator.geometry.tile // generator.geometry.patch
        assert side % 2, "an odd grid is what padding is for"
        features = torch.randn(3, side * side, channels, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(projector(features), generator.model.projector(features), rtol=0, atol=1e-5)


def test_gated_projector_is_ours(parts, tmp_path):
    checkpoint = write_random(tmp_path / "ckpt", "model=tiny_native")
    export_trtllm(checkpoint, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    channels, hidden = config["vision_config"]["hidden_size"], config["text_config"]["hidden_size"]
    projector = parts.Projector(channels, hidden, config["downsample_factor"], **config["projector"])
    projector.load_state_dict(parts.split_weights(load_file(tmp_path / "out" / "model.safetensors"))[1])
    with open_generator(checkpoint) as generator, torch.inference_mode():
        features = torch.randn(3, 4 * 4, channels, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(projector(features), generator.model.projector(features), rtol=0, atol=1e-5)


def test_splits_weights(folder, parts):
    weights = load_file(folder / "model.safetensors")
    split = parts.split_weights(weights)
    assert sum(map(len, split)) == len(weights)
    assert "model.layers.0.self_attn.q_proj.weight" in split[2]
    assert all(name.startswith("vision_model.") for name in split[0])
    with pytest.raises(ValueError, match="visual.x is of no part"):
        parts.split_weights({"visual.x": None})


def test_quantisation_of_the_language_alone(parts):
    excluded = ["lm_head", "model.vision_tower*", "model.multi_modal_projector*", "model.language_model.layers.0.mlp*"]
    given = SimpleNamespace(quant_algo="FP8", exclude_modules=excluded)
    own = parts.language_quantization(given)
    assert own.exclude_modules == ["lm_head", "model.layers.0.mlp*"] and own.quant_algo == "FP8"
    assert given.exclude_modules == excluded
    assert parts.language_quantization(None) is None


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({}, None),
        ({"factor": 2.0}, "YaRN's are 128"),
        ({"original_max_position_embeddings": None}, "lacks original_max"),
        ({"attention_factor": 1.0}, "attention_factor"),
        ({"truncate": False}, "truncate"),
        ({"truncate": True}, None),
    ],
)
def test_rope(parts, change, complaint):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **change}
    config = SimpleNamespace(rope_scaling=rope, max_position_embeddings=256)
    if complaint is None:
        parts.check_rope(config)
    else:
        with pytest.raises(ValueError, match=complaint):
            parts.check_rope(config)


def test_golden(checkpoint, golden):
    """Schema, and tokens that a generator writes too."""
    assert set(golden) == {"image_token", "cases"}
    assert [case["name"] for case in golden["cases"]] == ["text", "thought", "one tile", "tiles"]
    with open_generator(checkpoint) as generator:
        for case in golden["cases"]:
            assert set(case) == {"name", "prompt", "images", "prompt_tokens", "tiles", "tokens", "logprobs", "margins"}
            assert len(case["tokens"]) == len(case["logprobs"]) == len(case["margins"]) == NEW_TOKENS
            assert all(isinstance(token, int) for token in case["prompt_tokens"] + case["tokens"])
            assert all(value <= 0 for value in case["logprobs"]) and all(value >= 0 for value in case["margins"])
            tiles = [load_tiles(base64.b64decode(image), generator.geometry, "it") for image in case["images"]]
            assert sum(map(len, tiles)) == case["tiles"]
            count = case["tiles"] * generator.geometry.tokens_per_tile
            assert case["prompt_tokens"].count(golden["image_token"]) == count
    assert golden["cases"][3]["tiles"] > 1


TEXTUAL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False}
SCHEMAS = {
    "config.json": {
        "architectures": ["BlueLMVLForConditionalGeneration"],
        "model_type": "bluelm_vl",
        "image_token_id": int,
        "downsample_factor": int,
        "torch_dtype": str,
        "dtype": str,
        "auto_map": dict,
        "text_config": dict,
        "vision_config": dict,
    },
    "preprocessor_config.json": {"image_processor_type": str, "processor_class": str, "auto_map": dict, "tile": int},
    "processor_config.json": {"processor_class": "BlueLMVLProcessor", "auto_map": dict},
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": dict},
    "tokenizer.json": {"model": dict, "added_tokens": list},
    "generation_config.json": {"do_sample": False, "eos_token_id": int, "pad_token_id": int, "bos_token_id": int},
    "golden.json": {"image_token": int, "cases": list},
}


def agree(found, schema):
    return all(
        isinstance(found[key], one) if isinstance(one, type) else found[key] == one for key, one in schema.items()
    )


def test_schemas(folder, golden):
    contents = {path.name: json.loads(path.read_text()) for path in folder.rglob("*.json")}
    assert set(contents) == set(SCHEMAS)
    for name, content in contents.items():
        assert agree(content, SCHEMAS[name]), name
    config = contents["config.json"]
    text, vision = config["text_config"], config["vision_config"]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    assert agree(text, {**TEXTUAL, **dict.fromkeys((*sizes, "num_key_value_heads", "head_dim", "vocab_size"), int)})
    # YaRN in both styles, and nothing that TensorRT-LLM passes over.
    rope = text["rope_scaling"]
    assert set(rope) == {"rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
    assert text["rope_parameters"] == {**rope, "rope_theta": text["rope_theta"]}
    assert rope["factor"] * rope["original_max_position_embeddings"] == text["max_position_embeddings"]
    assert agree(vision, {"vision_use_head": False, "model_type": "siglip_vision_model", **dict.fromkeys(sizes, int)})
    assert vision["image_size"] % vision["patch_size"] == 0
    assert config["image_token_id"] == golden["image_token"]


CASE = {"tokens": [5, 6, 7], "logprobs": [-1.0, -1.0, -1.0], "margins": [1.0, 0.01, 1.0]}


@pytest.mark.parametrize(
    "tokens, logprobs, agrees, how",
    [
        ([5, 6, 7], [-1.0, -1.1, -1.0], True, "3 tokens agree"),
        ([5, 8, 9], [-1.0, -1.0, -3.0], True, "1 tokens agree, then two are as likely"),
        ([5, 6, 9], [-1.0, -1.0, -1.0], False, "token 2 is 9, not 7"),
        ([5, 6, 7], [-1.0, -1.5, -1.0], False, "token 1 differs by 0.5"),
        ([5], [-1.0], False, "ends after 1 of 3"),
    ],
)
def test_compares(tokens, logprobs, agrees, how):
    found, text = compare(CASE, tokens, logprobs, 0.2)
    assert found is agrees and how in text


def verify(folder, answers, tmp_path, with_trtllm=True):
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    path = {"PYTHONPATH": str(FAKE)} if with_trtllm else {}
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | path
    env["FAKE_TRTLLM_ANSWERS"] = str(tmp_path / "answers.json")
    return subprocess.run([sys.executable, folder / "verify_trtllm.py"], env=env, capture_output=True, text=True)


def test_script(folder, golden, tmp_path):
    done = verify(folder, golden["cases"], tmp_path)
    assert done.returncode == 0 and "all 4 answers agree" in done.stdout, done.stderr
    wrong = json.loads(json.dumps(golden["cases"]))
    wrong[0]["tokens"][0] += 1
    wrong[2]["prompt_tokens"].append(1)
    done = verify(folder, wrong, tmp_path)
    assert done.returncode == 1 and "2 of 4 answers differ" in done.stdout
    assert done.stdout.count("DIFFERS") == 2
    done = verify(folder, golden["cases"], tmp_path, with_trtllm=False)
    assert done.returncode == 2 and "not installed" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_command(folder, tmp_path):
    from nemo_bluelm.cli import verify_trtllm_command as command

    with pytest.raises(UserError, match="not installed here; run 'python"):
        command.run(SimpleNamespace(folder=folder, tolerance=None))
    with pytest.raises(UserError, match="export trtllm"):
        command.run(SimpleNamespace(folder=tmp_path, tolerance=None))


def test_stands_alone(folder):
    """Its files know nothing of this package."""
    for path in [*folder.glob("*.py"), *(folder / "bluelm_trtllm").glob("*.py")]:
        assert "nemo_bluelm" not in path.read_text()
    assert "never executed on TensorRT-LLM" in (folder / "bluelm_trtllm" / "README.md").read_text()
    assert not list(folder.rglob("__pycache__"))


def test_mistakes(tmp_path):
    yarn = ("model.language.yarn.factor=4", "model.language.yarn.mscale=0.5", "model.language.yarn.mscale_all_dim=0")
    checkpoint = write_random(tmp_path / "step_00000001", *yarn)
    with pytest.raises(UserError, match="attention_factor"):
        export_trtllm(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
