"""The native flavour: transformers' own Cohere2Vision is the checkpoint; models that it can't express are refused."""

import base64
import io
import json
import re

import pytest
import torch
from PIL import Image

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import Part
from nemo_bluelm.convert.engines import export_trtllm, export_vllm
from nemo_bluelm.convert.exporting import Flavour, export_hf, export_state
from nemo_bluelm.convert.importing import import_hf
from nemo_bluelm.convert.native import demand_native
from nemo_bluelm.convert.verify import verdict, verify
from nemo_bluelm.data.chat import encode_prompt
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE
from tests.convert.exports import write_random

NATIVE = ("model=tiny_native", "model.geometry.max_cols=3")
TALK = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is seven?"}]}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("run") / "step_00000003", *NATIVE)


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "native"
    export_hf(checkpoint, out, Flavour.native)
    return out


def failed(folder, checkpoint):
    return [check for check in verify(folder, checkpoint) if not check.passed]


def test_computes_the_same(folder, checkpoint):
    checks = list(verify(folder, checkpoint))
    assert not [check for check in checks if not check.passed]
    cases = {check.case for check in checks if check.stage == "logits"}
    assert cases == {"text", "one image", "tiles", "positions to 4096"}
    assert "stretches images" in verdict(folder, checkpoint, checks)["notes"][0]
    assert {"load", "tensors", "pixels", "ViT", "projector", "greedy"} < {check.stage for check in checks}


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.language.share_embeddings_and_output_weights=false", "precision.dtype=bf16"),
        ("model.geometry.tile=84", "model.geometry.merge=3", "model.language.yarn.factor=1"),
        ("model.language.qk_layernorm=true",),
    ],
    ids=["untied, bf16", "fold 3, no yarn", "normed queries and keys"],
)
def test_other_shapes(tmp_path, overrides):
    checkpoint = write_random(tmp_path / "ckpt", *NATIVE, *overrides)
    export_hf(checkpoint, tmp_path / "hf", Flavour.native)
    assert not failed(tmp_path / "hf", checkpoint)


def test_no_code_of_ours_runs(folder):
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(model).__module__ == "transformers.models.cohere2_vision.modeling_cohere2_vision"
    assert not any(info.values())
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    assert sorted(path.name for path in folder.glob("*.py")) == [
        "image_processing_bluelm_vl.py",
        "processing_bluelm_vl.py",
    ]


def test_verify_finds_halves_that_are_swapped(folder, checkpoint, tmp_path, monkeypatch):
    from transformers.models.cohere2_vision.modeling_cohere2_vision import Cohere2VisionMultiModalProjector as Projector

    forward = Projector.forward
    monkeypatch.setattr(Projector, "forward", lambda self, features: forward(self, features.flip(-1)))
    assert {check.stage for check in failed(folder, checkpoint)} >= {"projector", "logits"}


def test_back_bit_by_bit(folder, checkpoint, tmp_path):
    import_hf(folder, tmp_path / "ckpt", "tiny/sft")
    recipes = [load_recipe(str(path / RECIPE_FILE), []) for path in (checkpoint, tmp_path / "ckpt")]
    assert recipes[0].model == recipes[1].model
    rows = Tokenizer.load(checkpoint / TOKENIZER_FILE).vocab_size
    before, after = (dict(export_state(path, vocabulary=rows)) for path in (checkpoint, tmp_path / "ckpt"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_exact_flavour_and_onnx_of_the_same_model(checkpoint, tmp_path):
    export_hf(checkpoint, tmp_path / "exact")
    assert not failed(tmp_path / "exact", checkpoint)
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from nemo_bluelm.convert.onnx_export import export_onnx
    from tests.convert.test_onnx import compare

    export_onnx(checkpoint, tmp_path / "vision.onnx")
    compare(checkpoint, tmp_path / "vision.onnx")


class Tiles:
    """What a processor of transformers asks of an image processor, without torchvision: a tile of each image."""

    def __init__(self, config):
        self.patch_size, self.model_input_names = config["patch_size"], ["pixel_values"]

    def __call__(self, images, **_):
        return {"pixel_values": [0] * len(images), "num_patches": [1] * len(images)}


@pytest.mark.parametrize("think", [True, False])
def test_prompt_by_their_own_processor(folder, checkpoint, think, monkeypatch):
    """The same tokens: nothing stands between tiles."""
    from transformers import AutoTokenizer
    from transformers.models.cohere2_vision.processing_cohere2_vision import Cohere2VisionProcessor

    monkeypatch.setattr(Cohere2VisionProcessor, "check_argument_for_proper_class", lambda *_: None)
    tiles = Tiles(json.loads((folder / "preprocessor_config.json").read_text()))
    template = (folder / "chat_template.jinja").read_text()
    processor = Cohere2VisionProcessor(tiles, AutoTokenizer.from_pretrained(folder), chat_template=template)
    text = processor.apply_chat_template(TALK, enable_thinking=think, tokenize=False)
    found = processor(images=[Image.new("RGB", (56, 56))], text=text)["input_ids"][0]
    assert found == encode_prompt(TALK, Tokenizer.load(checkpoint / TOKENIZER_FILE), [4], think)


def test_images_by_their_own_processor(folder):
    """An image of a tile's size is the same; of a grid's, all but the thumbnail, which another library resized."""
    pytest.importorskip("torchvision")
    from transformers import AutoProcessor

    theirs, ours = AutoProcessor.from_pretrained(folder), AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for size, count in (((56, 56), 1), ((112, 112), 5)):
        images = [Image.effect_noise(size, 90).convert("RGB")]
        one, two = (p.image_processor(images, return_tensors="pt")["pixel_values"] for p in (theirs, ours))
        assert len(one) == len(two) == count
        torch.testing.assert_close(one[:4], two[:4], rtol=0, atol=1e-6)
        torch.testing.assert_close(one, two, rtol=0, atol=2 / 127.5)


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (("model=tiny",), ["model.projector.layer_norm false", "model.projector.activation swiglu, not gelu"]),
        (("model.projector.layer_norm=true",), ["model.projector.layer_norm false"]),
        (("model.projector.activation=gelu",), ["model.projector.activation swiglu, not gelu"]),
        (("model.geometry.tile=42",), ["model.geometry.tile a multiple of 28 (patch * merge, no padding), not 42"]),
        (("model.geometry.thumbnail=false",), ["model.geometry.thumbnail true"]),
    ],
)
def test_refused_with_every_key(tmp_path, overrides, keys):
    checkpoint = write_random(tmp_path / "ckpt", *NATIVE, *overrides)
    with pytest.raises(UserError) as error:
        export_hf(checkpoint, tmp_path / "hf", Flavour.native)
    assert str(error.value).count("\n") == 0 and "take exact" in str(error.value)
    named = re.search(r"needs (.*); take", str(error.value))[1]
    assert named == ", ".join(keys)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_for_vllm(checkpoint, tmp_path):
    """Images of its golden answers are whole tiles, which Cohere2Vision's processor leaves as they are."""
    export_vllm(checkpoint, tmp_path / "out", Flavour.native)
    cases = json.loads((tmp_path / "out" / "golden.json").read_text())["cases"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(image))).size for case in cases for image in case["images"]]
    assert sizes == [(56, 56), (168, 168)] and [case["tiles"] for case in cases] == [0, 0, 1, 10]
    untied = write_random(tmp_path / "ckpt", *NATIVE, "model.language.share_embeddings_and_output_weights=false")
    with pytest.raises(UserError, match="share_embeddings_and_output_weights true; take flavour exact"):
        export_vllm(untied, tmp_path / "untied", Flavour.native)
    assert not (tmp_path / "untied").exists()


def test_parts_and_engines_are_refused(checkpoint, tmp_path):
    model = load_recipe(str(checkpoint / RECIPE_FILE), []).model
    demand_native(model, set(Part))
    with pytest.raises(UserError, match="projector and language are missing; take exact"):
        demand_native(model, {Part.vision})
    with pytest.raises(UserError, match="no Cohere2Vision; leave --flavour out"):
        export_trtllm(checkpoint, tmp_path / "out", Flavour.native)
    assert not any(tmp_path.iterdir())


def test_foreign_folder_is_refused(folder, tmp_path):
    (tmp_path / "hf").mkdir()
    config = json.loads((folder / "config.json").read_text())
    for key in ("geometry", "projector", "parts"):
        del config[key]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lacks geometry"):
        import_hf(tmp_path / "hf", tmp_path / "ckpt")


def test_full_preset_is_expressible():
    model = load_recipe("sft", ["model=bluelm_2_5_3b_native", "data.root=x", "init_from=x"]).model
    demand_native(model, set(Part))
    assert (model.geometry.tile, model.geometry.patch, model.language.hidden_size) == (384, 16, 2560)
