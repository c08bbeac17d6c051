"""Every mistake in a recipe is one line that names the key or file, what was found and the way out."""

import pytest

from nemo_bluelm.config.checks import check_recipe
from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.errors import UserError

# What is replaced in the tiny recipe -> what the line must contain.
FILES = {
    "unknown key": (("lr:", "lrr:"), ["probe.yaml: unknown key optim.lrr", "did you mean optim.lr?"]),
    "unknown group": (("optim:\n", "optimm:\n"), ["unknown key optimm", "did you mean optim?"]),
    "word for a number": (("steps: 10", "steps: many"), ["train.steps is 'many'", "a whole number"]),
    "list for a number": (("steps: 10", "steps: [1]"), ["train.steps is '[1]'", "a whole number"]),
    "fraction": (("steps: 10", "steps: 1.5"), ["train.steps is '1.5'", "a whole number"]),
    "null": (("steps: 10", "steps:"), ["train.steps is null", "a whole number"]),
    "no choice": (("steps: 10", "freeze: [visoin]"), ["train.freeze[0] is 'visoin'", "vision, projector, language"]),
    "missing": (("lr: 1.0e-3", "warmup_steps: 1"), ["optim.lr is mandatory", "optim.lr=..."]),
    "group as number": (("name: probe", "name: probe\nparallel: 3"), ["parallel is a number", "a mapping of tensor"]),
    "sources as list": (("text: {shards: [text-*.tar]}", "- text"), ["data.sources is a list", "a mapping"]),
    "shards as text": (("[text-*.tar]", "text.tar"), ["data.sources.text.shards", "no list"]),
    "source's key": (("{shards:", "{shard:"), ["unknown key data.sources.text.shard", "data.sources.text.shards?"]),
    "block's option": (("model: tiny", "model: tinny"), ["model: tinny", "did you mean tiny?", "_native, tiny"]),
    "block": (("model: tiny", "modle: tiny"), ["modle: tiny: no such block", "did you mean model?"]),
    "base recipe": (("- _self_", "- base"), ["probe.yaml: base: no such block"]),
    "defaults' entry": (("- _self_", "- 3"), ["defaults must be a list of blocks", "- model: tiny"]),
    "defaults as mapping": (
        ("defaults:\n  - model: tiny\n  - parallel: single\n  - precision: fp32\n  - optim: adamw\n  - _self_",
         "defaults: {model: tiny}"),
        ["defaults must be a list of blocks"],
    ),
    "itself": (("- _self_", "- probe"), ["the defaults list includes itself"]),
    "mandatory block": (("model: tiny", "model: ???"), ["block model is mandatory", "model=NAME"]),
    "twice _self_": (("- _self_", "- _self_\n  - _self_"), ["_self_ is listed twice"]),
    "YAML": (("lr: 1.0e-3", "lr: [1"), ["probe.yaml: line ", "not valid YAML"]),
    "tab": (("  lr: 1.0e-3", "\tlr: 1.0e-3"), ["probe.yaml: line ", "not valid YAML"]),
    "key twice": (("name: probe", "name: a\nname: b"), ["line 9: not valid YAML: found duplicate key name"]),
    "reference": (("name: probe", "name: ${nome}"), ["name refers to ${nome}", "did you mean name?"]),
    "environment": (("name: probe", "name: ${oc.env:NO_SUCH_VARIABLE}"), ["environment variable NO_SUCH_VARIABLE"]),
    "circle": (("name: probe", "name: ${run_dir}"), ["name refers to itself"]),
    "open reference": (("name: probe", "name: ${run_dir"), ["name holds a malformed ${...}"]),
    "resolver": (("name: probe", "name: ${no.such:1}"), ["name uses ${no.such:...}"]),
    "reference's type": (("steps: 10", "steps: ${name}"), ["train.steps is 'probe'", "a whole number"]),
    "hydra": (("name: probe", "name: a\nhydra: {run: {dir: x}}"), ["hydra", "no effect"]),
}  # fmt: skip

OVERRIDES = {
    "optim.lrr=1": ["unknown key optim.lrr", "did you mean optim.lr?"],
    "+optim.lrr=1": ["+optim.lrr=1: unknown key optim.lrr", "did you mean optim.lr?"],
    "++zzz=1": ["unknown key zzz", "a recipe has name"],
    "optim.lr=abc": ["optim.lr is 'abc'", "a number"],
    "optim.lr=true": ["optim.lr is 'True'", "a number"],
    "parallel.sequence=maybe": ["parallel.sequence is 'maybe'", "true or false"],
    "precision.dtype=fp16": ["precision.dtype is 'fp16'", "allowed: fp32, bf16"],
    "optim.schedule=linear": ["optim.schedule is 'linear'", "constant, cosine, wsd, two_stage"],
    "optim.parts.visoin.lr=1": ["unknown key optim.parts.visoin", "did you mean optim.parts.vision?"],
    "model=tinny": ["model=tinny", "did you mean tiny?"],
    "model=": ["model has no option (empty)"],
    "modle=tiny": ["unknown key modle", "did you mean model?"],
    "parallel=3": ["a block is chosen by its name"],
    "+model=tiny": ["block model is listed twice"],
    "model@x=tiny": ["one place in a recipe", "model=NAME"],
    "train.freeze=vision": ["train.freeze is no list", "train.freeze=[vision]"],
    "data.sources.foo.weight=1": ["no source foo", "+data.sources={foo:"],
    "+data.sources.foo.shards=[a]": ["no source foo", "+data.sources={foo:"],
    "data.sources.text=3": ["data.sources.text is a number"],
    "~optim.lr": ["optim.lr is mandatory"],
    "~optim.lrr": ["no key optim.lrr to delete", "did you mean optim.lr?"],
    "optim.lr=1,2": ["optim.lr=1,2", "several values"],
    "optim.lr=choice(1,2)": ["several values"],
    "optim.lr=[": ["not a valid override"],
    "data.root=~/x": ["not a valid override", "\"'~/x'\""],
    "optim.lr": ["an override is key=value"],
    "=3": ["an override is key=value"],
    "hydra.run.dir=x": ["setting of Hydra"],
    "train.steps=${nope}": ["train.steps refers to ${nope}"],
    "name=null": ["name is null"],
}

# Overrides and number of processes -> what the line must contain.
CHECKS = [
    ("parallel.tensor=3", 3, ["num_attention_heads is 4", "parallel.tensor 3", "fits: parallel.tensor=1 train.global"]),
    ("parallel.tensor=4", 4, ["num_query_groups is 2", "parallel.tensor 4", "parallel.tensor=2"]),
    ("parallel.tensor=2 model.language.ffn_hidden_size=301", 2, ["ffn_hidden_size is 301", "fits: parallel.tensor=1"]),
    ("parallel.tensor=2 model.language.vocab_size=2047", 2, ["vocab_size is 2047", "fits: parallel.tensor=1"]),
    ("parallel.pipeline=3", 3, ["num_layers is 2", "3 pipeline stages", "fits: parallel.pipeline=1"]),
    ("parallel.pipeline=2 parallel.first_stage_layers=2", 2, ["first_stage_layers is 2", "below", "layers=null"]),
    ("parallel.pipeline=3 parallel.first_stage_layers=1", 3, ["less parallel.first_stage_layers is 1"]),
    ("parallel.first_stage_layers=1", 1, ["first_stage_layers is 1 with parallel.pipeline 1"]),
    ("parallel.virtual_pipeline=2", 1, ["virtual_pipeline is 2 with parallel.pipeline 1"]),
    ("parallel.pipeline=2 parallel.virtual_pipeline=2", 2, ["num_layers is 2", "virtual_pipeline", "pipeline=null"]),
    ("parallel.pipeline=2 parallel.virtual_pipeline=2 model.language.num_layers=4 train.global_batch_size=3", 2,
     ["global_batch_size is 3", "virtual_pipeline", "fits: train.global_batch_size=4"]),
    ("parallel.sequence=true", 1, ["parallel.sequence is true with parallel.tensor 1", "sequence=false"]),
    ("parallel.tensor=2 parallel.sequence=true data.sequence_length=511", 2,
     ["sequence_length is 511", "multiple of 2, for parallel.tensor", "fits: data.sequence_length=512"]),
    ("parallel.context=2 data.sequence_length=510", 2, ["sequence_length is 510", "2 * parallel.context", "=512"]),
    ("parallel.tensor=2", 1, ["tensor 2", "the job has 1 process", "--nproc 2", "fits: parallel.tensor=1"]),
    ("parallel.tensor=2", 3, ["the job has 3 processes", "--nproc 4"]),
    ("train.global_batch_size=3", 2, ["global_batch_size is 3", "data parallel size 2", "global_batch_size=4"]),
    ("train.micro_batch_size=4 train.global_batch_size=4", 2,
     ["global_batch_size is 4", "data parallel size 2 * train.micro_batch_size 4", "train.global_batch_size=8"]),
    ("train.micro_batch_size=0", 1, ["train.micro_batch_size is 0", "1 or more"]),
    ("data.max_documents=0", 1, ["data.max_documents is 0", "1 or more"]),
    ("parallel.context=4 parallel.context_comm=a2a", 4, ["context_comm is a2a", "num_query_groups is 2", "all_gather"]),
    ("precision=fp8_current precision.dtype=fp32", 1, ["fp8.recipe is current", "fp32", "set precision.dtype=bf16"]),
    ("precision=fp8_current data.sequence_length=500", 1, ["length is 500", "FP8 current", "sequence_length=496"]),
    ("precision=fp8_current model.language.ffn_hidden_size=392", 1, ["is 392", "16", "ffn_hidden_size=384", "=null"]),
    ("precision=fp8_blockwise", 1, ["kv_channels 32 is 64", "multiple of 128", "language.kv_channels=64"]),
    ("precision=fp8_delayed precision.fp8.bf16_last_layers=1", 1, ["bf16_last_layers is 1", "delayed", "=current"]),
    ("precision=fp8_current precision.fp8.bf16_first_layers=2 precision.fp8.bf16_last_layers=1", 1, ["num_layers 2"]),
    ("precision=fp8_current precision.fp8.bf16_first_layers=1 precision.fp8.bf16_last_layers=1", 1, ["leave none of"]),
    ("precision=fp8_current precision.fp8.parts=[vision] precision.fp8.bf16_first_layers=1", 1,
     ["bf16_first_layers is 1 without language in precision.fp8.parts", "set it to 0"]),
    ("precision.fp8.parts=[language,vision]", 1, ["parts is [language,vision] without precision.fp8.recipe"]),
    ("precision.fp8.bf16_first_layers=1", 1, ["bf16_first_layers is 1 without precision.fp8.recipe"]),
    ("precision=fp8_blockwise precision.fp8.parts=[language,vision]", 1, ["lists vision", "blockwise", "=current"]),
    ("precision=fp8_current precision.fp8.parts=[projector]", 1, ["lists projector", "BF16"]),
    ("precision=fp8_current precision.fp8.parts=[]", 1, ["precision.fp8.parts is empty"]),
    ("train.cuda_graphs=true train.recompute.language=mlp", 1, ["cuda_graphs is true", "language mlp", "=none"]),
    *((f"train.cuda_graphs=true parallel.context=2 parallel.context_comm={comm}", 2,
       ["cuda_graphs is true with parallel.context 2", "set parallel.context=1 or train.cuda_graphs=false"])
      for comm in ("all_gather", "a2a", "p2p")),
    ("train.recompute.vision=full train.freeze=[vision]", 1, ["recompute.vision is full", "leave vision out"]),
    ("train.recompute.language_layers=1", 1, ["language_layers is 1", "language none", "only full"]),
    ("train.recompute.language=full train.recompute.language_layers=3", 1, ["language_layers is 3", "num_layers 2"]),
    ("model.language.yarn.factor=0.5", 1, ["yarn.factor is 0.5", "1 or more"]),
    ("data.sequence_length=32768", 1, ["longer than the 4096 positions", "model.language.yarn.factor=8"]),
    ("model.language.hidden_size=0", 1, ["model.language.hidden_size is 0", "1 or more"]),
    ("model.language.num_query_groups=3", 1, ["num_query_groups is 3", "must divide", "nearest is 2"]),
    ("model.language.kv_channels=33", 1, ["kv_channels is 33", "even"]),
    ("model.vision.num_attention_heads=5", 1, ["vision.hidden_size is 64", "num_attention_heads 5"]),
    ("model.geometry.tile=57", 1, ["model.geometry.tile is 57", "nearest is 56"]),
    ("model.geometry.max_cols=0", 1, ["max_cols is 0"]),
    ("data.sequence_length=4", 1, ["sequence_length is 4", "one tile is 4 tokens"]),
    ("data.max_tiles=0", 1, ["data.max_tiles is 0", "1 or more"]),
    ("data.sources.text.weight=0", 1, ["data.sources.text.weight is 0", "greater than 0"]),
    ("data.sources.text.shards=[]", 1, ["data.sources.text.shards is empty"]),
    ("~data.sources.text", 1, ["data.sources is empty"]),
    ("optim.lr=0", 1, ["optim.lr is 0", "greater than 0"]),
    ("optim.lr=nan", 1, ["optim.lr is nan"]),
    ("optim.lr=inf", 1, ["optim.lr is inf"]),
    ("optim.beta1=1", 1, ["optim.beta1 is 1", "below 1"]),
    ("optim.min_lr=1", 1, ["optim.min_lr is 1", "at most optim.lr 0.001"]),
    ("optim.min_lr=1e-5 optim.schedule=constant", 1, ["optim.min_lr", "constant"]),
    ("optim.warmup_steps=11", 1, ["optim.warmup_steps is 11", "train.steps 10"]),
    ("optim.warmup_tokens=20481", 1, ["optim.warmup_tokens is 20481", "at most the run's 20480 tokens"]),
    ("optim.warmup_tokens=0", 1, ["optim.warmup_tokens is 0", "1 or more"]),
    ("optim.warmup_tokens=9 optim.warmup_steps=1", 1, ["optim.warmup_tokens is 9 with optim.warmup_steps 1", "=null"]),
    ("optim.schedule=wsd", 1, ["optim.decay_steps is null", "optim.decay_steps=1 (a tenth of train.steps)"]),
    ("optim.schedule=wsd optim.decay_steps=11", 1, ["optim.decay_steps is 11", "at most train.steps 10"]),
    ("optim.schedule=wsd optim.decay_steps=0", 1, ["optim.decay_steps is 0", "1 or more"]),
    ("optim.schedule=wsd optim.decay_steps=6 optim.warmup_steps=5", 1,
     ["optim.warmup_steps 5 and optim.decay_steps 6 overlap in train.steps 10"]),
    ("optim.schedule=wsd optim.decay_steps=6 optim.warmup_tokens=8193", 1,
     ["optim.warmup_tokens 8193 and optim.decay_steps 6 overlap in the run's 20480 tokens"]),
    ("optim.decay_steps=5", 1, ["optim.decay_steps is 5", "schedule cosine", "to wsd, or optim.decay_steps=null"]),
    ("optim.decay_shape=linear", 1, ["optim.decay_shape is linear", "schedule cosine", "optim.decay_shape=sqrt"]),
    ("optim.second_lr=1e-4", 1, ["optim.second_lr is 0.0001", "to two_stage, or optim.second_lr=null"]),
    ("optim.schedule=two_stage optim.second_stage_from=0.5", 1, ["optim.second_lr is null", "optim.second_lr=0.0001"]),
    ("optim.schedule=two_stage optim.second_lr=0.1", 1, ["optim.second_stage_from is null", "=0.8"]),
    ("optim.schedule=two_stage optim.second_lr=0 optim.second_stage_from=0.5", 1, ["optim.second_lr is 0", "greater"]),
    ("optim.schedule=two_stage optim.second_lr=0.1 optim.second_stage_from=1", 1, ["stage_from is 1", "below 1"]),
    ("optim.parts.vision.lr=0", 1, ["optim.parts.vision.lr is 0", "greater than 0"]),
    ("optim.parts.language.weight_decay=-1", 1, ["optim.parts.language.weight_decay is -1", "0 or more"]),
    ("optim.parts.projector.lr=1e-4 train.freeze=[projector]", 1,
     ["optim.parts.projector.lr is 0.0001, but train.freeze lists projector", "optim.parts.projector.lr=null"]),
    ("optim.parts.vision.weight_decay=0 train.freeze=[vision]", 1, ["vision.weight_decay is 0", "leave vision out"]),
    ("optim.vision_layer_decay=0.9 train.freeze=[vision]", 1, ["layer_decay is 0.9", "optim.vision_layer_decay=1"]),
    ("optim.vision_layer_decay=1.1", 1, ["optim.vision_layer_decay is 1.1", "at most 1"]),
    ("optim.vision_layer_decay=0", 1, ["optim.vision_layer_decay is 0", "greater than 0"]),
    ("train.min_text_share=1.1", 1, ["train.min_text_share is 1.1", "at most 1"]),
    ("train.min_text_share=-1", 1, ["train.min_text_share is -1", "0 or more"]),
    ("train.steps=0", 1, ["train.steps is 0", "1 or more"]),
    ("train.save_every=0", 1, ["train.save_every is 0"]),
    ("train.keep_checkpoints=0", 1, ["train.keep_checkpoints is 0", "-1"]),
    ("train.freeze=[vision,projector,language]", 1, ["train.freeze", "nothing is left to train"]),
    ("name=a/b", 1, ["name is 'a/b'"]),
    ("data.root=''", 1, ["data.root is empty"]),
]  # fmt: skip


def _message(path, overrides, world_size=1) -> str:
    with pytest.raises(UserError) as caught:
        check_recipe(load_recipe(path, overrides), world_size)
    message = str(caught.value)
    assert "\n" not in message and "object_type" not in message
    return message


@pytest.mark.parametrize("replace, expected", FILES.values(), ids=FILES.keys())
def test_mistake_in_a_file(recipe_file, replace, expected):
    message = _message(recipe_file(replace), [])
    assert all(text in message for text in expected), message


@pytest.mark.parametrize("override, expected", OVERRIDES.items(), ids=OVERRIDES.keys())
def test_mistake_in_an_override(recipe_file, override, expected):
    message = _message(recipe_file(), [override])
    assert all(text in message for text in expected), message


@pytest.mark.parametrize("overrides, world_size, expected", CHECKS, ids=[f"{o} on {w}" for o, w, _ in CHECKS])
def test_mistake_across_keys(recipe_file, overrides, world_size, expected):
    message = _message(recipe_file(), overrides.split(), world_size)
    assert all(text in message for text in expected), message


@pytest.mark.parametrize(
    "overrides",
    [
        "optim.schedule=wsd optim.decay_steps=6 optim.warmup_steps=4",
        "optim.schedule=wsd optim.decay_steps=6 optim.warmup_tokens=8192",
        "optim.schedule=wsd optim.decay_steps=10 optim.min_lr=1e-3 optim.decay_shape=cosine",
        "optim.schedule=two_stage optim.second_lr=1 optim.second_stage_from=0.999",
        "optim.warmup_tokens=20480",
        "optim.parts.vision.lr=1e-2 optim.parts.language.weight_decay=0 optim.vision_layer_decay=0.9",
        "optim.parts.vision.lr=1e-2 train.freeze=[projector]",
    ],
)
def test_limits_themselves_are_allowed(recipe_file, overrides):
    check_recipe(load_recipe(recipe_file(), overrides.split()), 1)


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", ["is empty", "nemo-bluelm recipes"]),
        (b"- a\n", ["holds a list"]),
        (b"text", ["holds a str"]),
        (b"\xff\xfe\x00", ["UTF-8"]),
        (b"a: \x07", ["not valid YAML"]),
    ],
)
def test_file_that_is_no_recipe(tmp_path, content, expected):
    (tmp_path / "r.yaml").write_bytes(content)
    message = _message(str(tmp_path / "r.yaml"), [])
    assert all(text in message for text in ["r.yaml", *expected]), message


def test_mistake_in_a_block_names_the_block(tmp_path, recipe_file):
    (tmp_path / "model").mkdir()
    for name, text in {
        "key": "language: {hidden_sise: 3}",
        "shape": "language: 3",
        "list": "[1]",
        "yaml": "language: {hidden_size: 3",
    }.items():
        (tmp_path / "model" / f"{name}.yaml").write_text(f"{text}\n")
    path = recipe_file()
    assert "block model/key: unknown key model.language.hidden_sise; did you mean" in _message(path, ["model=key"])
    assert "block model/shape: model.language is a number" in _message(path, ["model=shape"])
    assert "block model/list: model is a list" in _message(path, ["model=list"])
    assert "model/yaml.yaml: line 2: not valid YAML" in _message(path, ["model=yaml"])


def test_recipe_not_found_names_the_nearest(tmp_path):
    assert "did you mean tiny/sft?" in _message("tiny/stf", [])
    assert "did you mean tiny/align_projector?" in _message("recipes/tiny/align.yaml", [])
    assert "is a folder" in _message(str(tmp_path), [])
    (tmp_path / "r.yml").write_text("name: x\n")
    assert "rename it to r.yaml" in _message(str(tmp_path / "r.yml"), [])
    (tmp_path / "a@b.yaml").write_text("name: x\n")
    assert "file name is made of" in _message(str(tmp_path / "a@b.yaml"), [])


MACHINE = {
    "train.cuda_graphs=true": "train.cuda_graphs=false",
    "precision=fp8_current": "precision.fp8.recipe=null",
    "parallel.context=2 parallel.context_comm=p2p": "parallel.context_comm=all_gather",
}


@pytest.mark.parametrize("overrides", MACHINE)
def test_what_only_a_gpu_can_is_refused_without_one(overrides, monkeypatch):
    import torch

    from nemo_bluelm.config.checks import check_machine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"no CUDA device; set {MACHINE[overrides]}"):
        check_machine(load_recipe("tiny/sft", overrides.split()))
    check_machine(load_recipe("tiny/sft", [*overrides.split(), MACHINE[overrides]]))


@pytest.mark.parametrize(
    "precision, capability, expected",
    [
        ("fp8_current", (8, 0), "needs compute capability 8.9"),
        ("fp8_blockwise", (8, 9), "needs compute capability 9.0"),
        ("fp8_blockwise", (9, 0), None),
        ("fp8_delayed", (8, 9), None),
    ],
)
def test_fp8_needs_its_gpu(precision, capability, expected, monkeypatch):
    import torch

    from nemo_bluelm.config import checks

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(checks, "find_spec", lambda name: object())
    recipe = load_recipe("tiny/sft", [f"precision={precision}"])
    if expected is None:
        checks.check_machine(recipe)
    else:
        with pytest.raises(UserError, match=expected):
            checks.check_machine(recipe)
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs Transformer Engine"):
        checks.check_machine(recipe)
