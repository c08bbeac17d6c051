"""A run of four ranks starts from two imports, and its checkpoint exports as Megatron reads it."""

import shutil

import torch
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from nemo_bluelm.config.compose import load_without_data
from nemo_bluelm.config.schema import Part
from nemo_bluelm.convert.exporting import export_state
from nemo_bluelm.convert.hf_config import language_config, vision_config
from nemo_bluelm.convert.importing import import_hf
from nemo_bluelm.convert.table import EXPORT, LLAMA, SIGLIP
from nemo_bluelm.runtime.run_dir import newest
from tests.convert.conftest import save
from tests.oracles.hf_weights import language_tensors, vision_tensors

RECIPE = "tiny/joint_pretrain"


def test_start_and_export(corpus, tmp_path, cli_process):
    recipe, _, _ = load_without_data(RECIPE, [])
    save(LlamaForCausalLM(LlamaConfig(**language_config(recipe.model.language))), tmp_path / "llama")
    shutil.copyfile(corpus / "tokenizer.json", tmp_path / "llama" / "tokenizer.json")
    save(SiglipVisionModel(SiglipVisionConfig(**vision_config(recipe.model))), tmp_path / "siglip")
    for name in ("llama", "siglip"):
        assert not import_hf(tmp_path / name, tmp_path / f"{name}_ckpt", RECIPE).replaced

    # A rate too small to change an fp32 weight.
    settings = [
        f"data.root={corpus}",
        f"run_dir={tmp_path / 'run'}",
        "train.steps=1",
        "optim.lr=1e-30",
        "optim.warmup_steps=0",
    ]
    starts = [f"init_from={tmp_path / 'llama_ckpt'}", f"init_vision_from={tmp_path / 'siglip_ckpt'}"]
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "--nproc", "4"]
    run = cli_process("train", RECIPE, *settings, *starts, *layout, timeout=300, OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stderr
    checkpoint = newest(tmp_path / "run")

    for part, layout, folder in ((Part.language, LLAMA, "llama"), (Part.vision, SIGLIP, "siglip")):
        wanted = dict(export_state(tmp_path / f"{folder}_ckpt", layout))
        found = dict(export_state(checkpoint, layout))
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted), part

    from nemo_bluelm.runtime.single import load_model, single_process_world

    state = dict(export_state(checkpoint))
    with single_process_world():
        model, _, _ = load_model(checkpoint)
    shape = recipe.model
    language = {k.replace(EXPORT[Part.language], "model."): v for k, v in state.items() if "language_model" in k}
    vision = {k.removeprefix(EXPORT[Part.vision]): v for k, v in state.items() if k.startswith(EXPORT[Part.vision])}
    for module, tensors in (
        (model.language, language_tensors(language, shape.language.num_query_groups)),
        (model.vision, vision_tensors(vision, shape.vision.num_attention_heads)),
    ):
        weights = dict(module.named_parameters())
        assert weights.keys() == tensors.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in tensors.items())
