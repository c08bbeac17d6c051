"""An exported folder, as transformers sees it, is the checkpoint: its images, prompts, weights and answers."""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import ControlToken, Part, geometry_of
from nemo_bluelm.convert.exporting import export_hf, export_state
from nemo_bluelm.convert.importing import import_hf
from nemo_bluelm.convert.shards import Shards
from nemo_bluelm.convert.verify import verify
from nemo_bluelm.data.chat import encode_conversation, encode_prompt
from nemo_bluelm.data.decode import get_backend
from nemo_bluelm.data.tokenizer import Tokenizer
from nemo_bluelm.errors import UserError
from nemo_bluelm.generate.generator import open_generator
from nemo_bluelm.generate.request import Prompt, Sampling
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE
from tests.convert.exports import ODD, write_random

STAGES = {"config", "tensors", "load", "prompt", "pixels", "ViT", "projector", "logits", "greedy"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("run") / "step_00000003", *ODD)


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "hf"
    export_hf(checkpoint, out, shard_bytes=400_000)
    return out


@pytest.fixture(scope="module")
def processor(folder):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def failed(folder, checkpoint):
    return [(check.stage, check.case) for check in verify(folder, checkpoint) if not check.passed]


def test_computes_the_same(folder, checkpoint):
    checks = list(verify(folder, checkpoint))
    assert not [check for check in checks if not check.passed]
    assert {check.stage for check in checks} == STAGES
    assert {check.case for check in checks if check.stage == "logits"} == {
        "text",
        "one image",
        "tiles",
        "positions to 4096",
    }
    assert len(list(folder.glob("*.safetensors"))) > 3


def test_bf16_untied_without_yarn(tmp_path):
    untied = "model.language.share_embeddings_and_output_weights=false"
    checkpoint = write_random(tmp_path / "ckpt", untied, "model.language.yarn.factor=1")
    export_hf(checkpoint, tmp_path / "hf", dtype=torch.bfloat16)
    assert {header.dtype for header in Shards(tmp_path / "hf").headers.values()} == {"BF16"}
    assert not failed(tmp_path / "hf", checkpoint)


def test_normed_queries_and_keys_make_a_qwen3(tmp_path):
    checkpoint = write_random(tmp_path / "here", "model.language.qk_layernorm=true", *ODD)
    export_hf(checkpoint, tmp_path / "normed")
    assert json.loads((tmp_path / "normed" / "config.json").read_text())["text_config"]["model_type"] == "qwen3"
    assert not failed(tmp_path / "normed", checkpoint)
    back_bit_by_bit(tmp_path / "normed", checkpoint, tmp_path)


def test_back_bit_by_bit(folder, checkpoint, tmp_path):
    back_bit_by_bit(folder, checkpoint, tmp_path)


def back_bit_by_bit(folder, checkpoint, tmp_path):
    import_hf(folder, tmp_path / "ckpt", "tiny/sft")
    recipes = [load_recipe(str(path / RECIPE_FILE), []) for path in (checkpoint, tmp_path / "ckpt")]
    assert recipes[0].model == recipes[1].model
    rows = Tokenizer.load(checkpoint / TOKENIZER_FILE).vocab_size
    assert rows < recipes[0].model.language.vocab_size
    before, after = (dict(export_state(path, vocabulary=rows)) for path in (checkpoint, tmp_path / "ckpt"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "ckpt" / TOKENIZER_FILE).read_bytes() == (checkpoint / TOKENIZER_FILE).read_bytes()


@pytest.mark.parametrize("size", [(20, 15), (42, 42), (126, 168), (300, 41), (37, 900), (101, 77)])
def test_pixels(processor, checkpoint, size):
    geometry = geometry_of(load_recipe(str(checkpoint / RECIPE_FILE), []).model)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    image.save(content := io.BytesIO(), "PNG", exif=exif)
    (tiles,) = get_backend("pil").tiles([content.getvalue()], geometry)
    found = processor.image_processor(Image.open(content))
    assert torch.equal(found["pixel_values"], tiles.float() / 127.5 - 1)
    counts = processor._get_num_multimodal_tokens([size])  # (height, width) of the upright image
    assert counts.num_image_patches == [len(tiles)] == found["num_patches"]
    assert counts.num_image_tokens == [len(tiles) * geometry.tokens_per_tile]


def test_grid_of_every_size(processor, checkpoint):
    geometry = geometry_of(load_recipe(str(checkpoint / RECIPE_FILE), []).model)
    for width, height in np.random.default_rng(0).integers(1, 400, (500, 2)).tolist():
        assert processor.image_processor.grid(width, height) == geometry.grid(width, height)
        assert processor.image_processor.fit(width, height) == geometry.fit(width, height)


TALKS = [
    [{"role": "user", "content": "describe  \n"}],
    [
        {"role": "user", "content": [{"type": "text", "text": "two \n"}, {"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "thinking": "a number\n\n", "content": "seven\n"},
        {"role": "user", "content": "and nine?"},
        {"role": "assistant", "content": "a word"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
    ],
]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("think", [True, False, None])
def test_prompts(processor, checkpoint, talk, think):
    tokenizer, images, counts = Tokenizer.load(checkpoint / TOKENIZER_FILE), *pictures(talk)
    option = {} if think is None else {"enable_thinking": think}
    text = processor.apply_chat_template(talk, tokenize=False, **option)
    found = processor(images=images, text=text)["input_ids"][0]
    assert found == encode_prompt(talk, tokenizer, counts, bool(think))


def test_conversation_and_control_token_in_front(checkpoint, tmp_path):
    from transformers import AutoProcessor

    changed = write_random(tmp_path / "ckpt", "data.chat.control_token=before_query", *ODD)
    export_hf(changed, tmp_path / "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    talk = [*TALKS[1], {"role": "assistant", "thinking": "hm", "content": "that"}]
    images, counts = pictures(talk)
    found = processor(images=images, text=processor.apply_chat_template(talk, tokenize=False))["input_ids"][0]
    tokenizer = Tokenizer.load(changed / TOKENIZER_FILE)
    assert found == encode_conversation(talk, tokenizer, counts, ControlToken.before_query).tokens
    assert found != encode_conversation(talk, tokenizer, counts).tokens


def pictures(talk):
    """As many as the talk has places for, and their tokens: a tile of an odd grid of 3 x 3 patches has 2 x 2."""
    count = sum(part["type"] == "image" for turn in talk for part in turn["content"] if isinstance(part, dict))
    sizes = [(42, 42), (84, 42), (42, 126)][:count]
    return [Image.new("RGB", size) for size in sizes], [4, 3 * 4, 4 * 4][:count]


def test_batch(processor, folder):
    """Two prompts of different lengths answer as each alone does."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    images = [[Image.effect_noise((84, 42), 90)], [Image.effect_noise((42, 126), 90)]]
    texts = ["<s>[|Human|]:<image>what?\n[|AI|]:", "<s>[|Human|]:<image>describe the picture, a word\n[|AI|]:"]
    options = dict(return_tensors="pt", padding=True, padding_side="left", return_mm_token_type_ids=True)
    both = processor(images=images, text=texts, **options)
    kinds = both.pop("mm_token_type_ids")
    assert torch.equal(kinds == 1, both["input_ids"] == processor.image_token_id)
    together = model.generate(**both, max_new_tokens=8, do_sample=False, min_new_tokens=8)[:, -8:]
    for row, (image, text) in enumerate(zip(images, texts)):
        alone = processor(images=image, text=text, return_tensors="pt")
        answer = model.generate(**alone, max_new_tokens=8, do_sample=False, min_new_tokens=8)[0, -8:]
        assert torch.equal(answer, together[row])
    with pytest.raises(ValueError, match="2 <image> and 1 images"):
        processor(images=images[:1], text=texts)


def test_images_are_answered_as_by_the_checkpoint(processor, checkpoint, folder):
    """From the image files on: the folder's processor, its model and Hugging Face's generate against our generator."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    new, talk = 8, [{"role": "user", "content": [*[{"type": "image"}] * 2, {"type": "text", "text": "what?"}]}]
    images = [Image.effect_noise((90, 41), 90).convert("RGB"), Image.effect_noise((40, 131), 90).convert("RGB")]
    text = processor.apply_chat_template(talk, tokenize=False)
    inputs = processor(images=images, text=text, return_tensors="pt")
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, return_dict_in_generate=True)
    found = model.generate(**inputs, **options, output_logits=True)
    tokens = found.sequences[0, -new:].tolist()
    scores = [logits[0].log_softmax(-1)[token].item() for logits, token in zip(found.logits, tokens)]
    files = []
    for image in images:
        image.save(file := io.BytesIO(), "PNG")
        files.append(file.getvalue())
    with open_generator(checkpoint) as generator:
        sampling = Sampling(max_new_tokens=new, min_new_tokens=new, enforce=False)
        (reply,) = generator.generate([Prompt(talk, files)], sampling)
    assert list(reply.tokens) == tokens
    assert reply.logprobs == pytest.approx(scores, abs=1e-5)


def change_json(name, change):
    def apply(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def change_text(name, old, new):
    def apply(folder):
        text = (folder / name).read_text()
        assert text.count(old) == 1
        (folder / name).write_text(text.replace(old, new))

    return apply


def change_weight(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        (change_weight, {"tensors"}),
        (change_json("config.json", lambda c: c["text_config"]["rope_parameters"].update(factor=4.0)), {"config"}),
        (change_json("config.json", lambda c: c["text_config"].pop("rope_theta")), {"config"}),
        (change_json("config.json", lambda c: c.update(image_token_id=5)), {"config"}),
        (change_json("preprocessor_config.json", lambda c: c.update(max_cols=2)), {"config"}),
        (change_json("generation_config.json", lambda c: c.update(eos_token_id=1)), {"config"}),
        (change_text("modeling_bluelm_vl.py", "(0, 0, 0, pad, 0, pad)", "(0, 0, pad, 0, pad, 0)"), {"projector", "l"}),
        (change_text("image_processing_bluelm_vl.py", "swapaxes(1, 2)", "swapaxes(1, 2)[::-1]"), {"pixels", "l"}),
        (change_text("chat_template.jinja", "\\n[|AI|]:", "[|AI|]:"), {"prompt"}),
    ],
)
def test_verify_finds(folder, checkpoint, tmp_path, change, stages):
    copy = tmp_path / tmp_path.name  # a process imports the code of each name once
    shutil.copytree(folder, copy)
    change(copy)
    found = {stage for stage, _ in failed(copy, checkpoint)}
    if "l" in stages:  # logits differ too, and greedy tokens may
        stages = stages - {"l"} | {"logits"}
        found -= {"greedy", "ViT", "projector"} - stages
    assert found == stages


@pytest.mark.parametrize("how", ["missing", "broken"])
def test_verify_of_a_folder_whose_template_cannot_be_used(folder, checkpoint, tmp_path, how):
    copy = tmp_path / tmp_path.name
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").unlink()
    if how == "broken":
        (copy / "chat_template.jinja").write_text("{% if x")
    with pytest.raises(UserError, match="the processor of .* fails: .*template.*; export the model again"):
        list(verify(copy, checkpoint))


def test_card_tells_the_training(checkpoint, folder):
    card = (folder / "README.md").read_text()
    assert "recipe `tiny_sft`, 3 optimizer steps" in card and "megatron-core" in card
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            assert "/tmp" not in path.read_text() and "nemo_bluelm" not in path.read_text()


def test_parts_alone_make_no_model(folder, tmp_path):
    from tests.convert.conftest import save_vision

    save_vision(tmp_path / "siglip", both=False)
    import_hf(tmp_path / "siglip", tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["parts"] == [Part.vision.value] and "auto_map" not in config
    assert not list((tmp_path / "hf").glob("*.py"))
    import_hf(tmp_path / "hf", tmp_path / "back")
    recipes = [load_recipe(str(tmp_path / name / RECIPE_FILE), []) for name in ("ckpt", "back")]
    assert recipes[0].model == recipes[1].model
    with pytest.raises(UserError, match="no whole model"):
        list(verify(tmp_path / "hf", tmp_path / "ckpt"))


@pytest.mark.slow
@pytest.mark.skipif("OTHER_TRANSFORMERS" not in os.environ, reason="OTHER_TRANSFORMERS names no folder with one")
def test_other_transformers(folder, tmp_path):
    """Set it to what ``pip install --target DIR --no-deps transformers==5.5.4 ...`` has made."""
    results = []
    for number, path in enumerate(("", os.environ["OTHER_TRANSFORMERS"])):
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        out = tmp_path / f"{number}.pt"
        subprocess.run([sys.executable, "-c", ANSWER, str(folder), str(out)], env=environment, check=True)
        results.append(torch.load(out))
    assert results[0]["version"].split(".")[0] != results[1]["version"].split(".")[0]
    for name in ("input_ids", "pixel_values", "new"):
        assert torch.equal(results[0][name], results[1][name]), name
    torch.testing.assert_close(results[0]["logits"], results[1]["logits"], atol=1e-5, rtol=1e-5)


ANSWER = """
import sys, torch, transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
load = dict(trust_remote_code=True)
model, info = AutoModelForImageTextToText.from_pretrained(sys.argv[1], output_loading_info=True, **load)
assert not info["missing_keys"] and not info["unexpected_keys"], info
processor = AutoProcessor.from_pretrained(sys.argv[1], **load)
talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what? "}]}]
text = processor.apply_chat_template(talk, enable_thinking=True, tokenize=False)
inputs = processor(images=[Image.linear_gradient("L").resize((126, 84))], text=text, return_tensors="pt")
with torch.inference_mode():
    logits = model.eval()(**inputs).logits
    new = model.generate(**inputs, max_new_tokens=16, do_sample=False)
torch.save({"version": transformers.__version__, "logits": logits, "new": new, **inputs}, sys.argv[2])
"""
