"""Imported weights compute what transformers computes, and come back bit by bit."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.config.schema import Dtype, Part, PrecisionConfig
from nemo_bluelm.convert.exporting import export_hf, export_state
from nemo_bluelm.convert.importing import import_hf
from nemo_bluelm.convert.table import LLAMA, SIGLIP
from nemo_bluelm.runtime.environment import prepare
from nemo_bluelm.runtime.run_dir import RECIPE_FILE, TOKENIZER_FILE, parts_in, resolve_checkpoint
from tests.convert.conftest import save_language, save_vision
from tests.oracles.hf_weights import normalized
from tests.tiny_checkpoint import tiny_checkpoint  # noqa: F401


def part_of(checkpoint, part):
    """A model of the checkpoint's recipe whose ``part`` has the checkpoint's weights, as Megatron loads them."""
    prepare()
    from megatron.core import dist_checkpointing

    from nemo_bluelm.data.tokenizer import Tokenizer
    from nemo_bluelm.runtime.run_dir import WEIGHTS_DIR
    from nemo_bluelm.runtime.single import STATE_PREFIX, build_model

    recipe = load_recipe(str(checkpoint / RECIPE_FILE), [])
    recipe = replace(recipe, precision=PrecisionConfig(Dtype.fp32))
    model = build_model(recipe, Tokenizer.load(checkpoint / TOKENIZER_FILE).image, local=True)
    names = f"{STATE_PREFIX}{part.value}."
    wanted = {k: v for k, v in model.sharded_state_dict(prefix=STATE_PREFIX).items() if k.startswith(names)}
    state = dist_checkpointing.load(wanted, str(checkpoint / WEIGHTS_DIR))
    state = {name.removeprefix(names): value for name, value in state.items() if name.startswith(names)}
    getattr(model, part.value).load_state_dict(state)
    return model.eval()


def folder_state(folder):
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("both", [True, False])
@torch.no_grad()
def test_vision(tmp_path, both):
    from nemo_bluelm.runtime.single import single_process_world

    hf = save_vision(tmp_path / "siglip", both)
    done = import_hf(tmp_path / "siglip", tmp_path / "ckpt", "tiny/sft")
    assert done.tensors == {Part.vision: 5 + 3 * 16} and done.vocabulary is None
    assert set(done.skipped) == ({"text tower", "pooling head"} if both else set())
    checkpoint = resolve_checkpoint(str(tmp_path / "ckpt"), "init_vision_from")
    assert parts_in(checkpoint) == {Part.vision}

    recipe = load_recipe(str(checkpoint / RECIPE_FILE), [])
    assert (recipe.model.geometry.tile, recipe.model.vision.ffn_hidden_size) == (56, 144)
    tiles = torch.randint(0, 256, (3, 3, 60, 60), dtype=torch.uint8)
    with single_process_world():
        ours = part_of(checkpoint, Part.vision).vision(tiles[..., :56, :56])
    torch.testing.assert_close(ours, hf(normalized(tiles)).last_hidden_state, atol=1e-5, rtol=1e-5)

    back = dict(export_state(checkpoint, SIGLIP))
    assert_equal(back, {f"vision_model.{k.removeprefix('vision_model.')}": v for k, v in hf.state_dict().items()})


def test_vision_as_transformers_5_names_it(tmp_path):
    save_vision(tmp_path / "siglip", both=False)
    import_hf(tmp_path / "siglip", tmp_path / "one")
    state = folder_state(tmp_path / "siglip")
    bare = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    assert bare.keys().isdisjoint(state)
    save_file(bare, tmp_path / "siglip" / "model.safetensors")
    import_hf(tmp_path / "siglip", tmp_path / "two")
    assert_equal(dict(export_state(tmp_path / "two")), dict(export_state(tmp_path / "one")))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "400KB"])
@torch.no_grad()
def test_language(tmp_path, kind, tied, shard):
    from nemo_bluelm.runtime.single import single_process_world

    hf = save_language(tmp_path / kind, shard, kind=kind, tie_word_embeddings=tied)
    assert (tmp_path / kind / "model.safetensors.index.json").exists() == (shard != "5GB")
    done = import_hf(tmp_path / kind, tmp_path / "ckpt")
    assert done.vocabulary == (300, 384)
    checkpoint = resolve_checkpoint(str(tmp_path / "ckpt"), "init_from")
    assert parts_in(checkpoint) == {Part.language}
    language = load_recipe(str(checkpoint / RECIPE_FILE), []).model.language
    assert (language.rotary_base, language.layernorm_epsilon, language.yarn.factor) == (500000, 1e-5, 1)
    assert language.share_embeddings_and_output_weights is tied and language.qk_layernorm is (kind == "qwen3")

    tokens = torch.randint(0, 300, (1, 40))
    with single_process_world():
        ours = logits(part_of(checkpoint, Part.language).language, tokens)
    theirs = hf(tokens).logits[0]
    torch.testing.assert_close(ours[:, :300], theirs, atol=1e-5, rtol=1e-5)
    mean = theirs.mean(1, keepdim=True).expand(-1, 84)  # of each row's logits, which are linear in the head's rows
    torch.testing.assert_close(ours[:, 300:], mean, atol=1e-5, rtol=1e-4)

    assert_equal(dict(export_state(checkpoint, LLAMA, vocabulary=300)), folder_state(tmp_path / kind))


def logits(language, tokens):
    """[S, vocabulary] of one document."""
    from nemo_bluelm.layers.attention import PackParams

    count = tokens.size(1)
    bounds, positions = torch.tensor([0, count], dtype=torch.int32), torch.arange(count).unsqueeze(0)
    pack = PackParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds,
        max_seqlen_q=count,
        max_seqlen_kv=count,
        bounds=(0, count),
    )
    return language.logits(language.hidden_states(language.embed(tokens, positions), positions, count, pack))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_yarn_and_bf16(tmp_path, kind):
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 16.0}
    save_language(tmp_path / kind, kind=kind, dtype=torch.bfloat16, rope_scaling=scaling)
    import_hf(tmp_path / kind, tmp_path / "ckpt")
    recipe = load_recipe(str(tmp_path / "ckpt" / RECIPE_FILE), [])
    yarn = recipe.model.language.yarn
    assert (yarn.factor, yarn.original_max_position_embeddings, yarn.beta_fast, yarn.beta_slow) == (8, 32, 16, 1)
    assert recipe.precision.dtype is Dtype.bf16
    assert_equal(dict(export_state(tmp_path / "ckpt", LLAMA, vocabulary=300)), folder_state(tmp_path / kind))


def test_own_export_and_back(tiny_checkpoint, tmp_path):  # noqa: F811
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    from nemo_bluelm.data.tokenizer import Tokenizer
    from nemo_bluelm.runtime.single import load_model, single_process_world

    done = export_hf(tiny_checkpoint, tmp_path / "hf")
    there, rows = done.vocabulary
    assert there == 2048 and rows == Tokenizer.load(tiny_checkpoint / TOKENIZER_FILE).vocab_size
    done = import_hf(tmp_path / "hf", tmp_path / "ckpt", "tiny/sft")
    assert set(done.tensors) == set(Part) and not done.skipped and not done.replaced
    assert (tmp_path / "ckpt" / TOKENIZER_FILE).read_bytes() == (tiny_checkpoint / TOKENIZER_FILE).read_bytes()
    stored = [load_sharded_metadata(str(folder / "weights")) for folder in (tiny_checkpoint, tmp_path / "ckpt")]
    assert stored[0].keys() == stored[1].keys()  # tensors and the layers' states
    with single_process_world():
        (one, recipe, _), (two, again, _) = load_model(tiny_checkpoint), load_model(tmp_path / "ckpt")
        assert recipe.model == again.model
        before, after = dict(one.named_parameters()), dict(two.named_parameters())
        table = "language.embedding.word_embeddings.weight"
        real, padding = after[table].split([rows, there - rows])
        torch.testing.assert_close(padding, real.mean(0, keepdim=True).expand_as(padding))
        after[table], before[table] = real, before[table][:rows]
        assert_equal(after, before)


def test_recipe_gives_the_vocabulary_and_the_rest(language_folder, tmp_path):
    done = import_hf(language_folder, tmp_path / "ckpt", "tiny/sft", ("seed=7",))
    recipe = load_recipe(str(tmp_path / "ckpt" / RECIPE_FILE), [])
    assert done.vocabulary == (300, 2048) and recipe.model.language.vocab_size == 2048 and recipe.seed == 7
    assert done.replaced["model.language.hidden_size"] == (128, 96)
    assert not any(key.startswith("model.vision") for key in done.replaced)


def test_nemo_connectors(language_folder, tmp_path):
    prepare()
    from nemo.lightning import io

    from nemo_bluelm.convert import connectors  # noqa: F401
    from nemo_bluelm.data.tokenizer import Tokenizer
    from nemo_bluelm.runtime.plugin import BlueLM
    from nemo_bluelm.train.losses import TokenLoss

    import_hf(language_folder, tmp_path / "ckpt")
    recipe = load_recipe(str(tmp_path / "ckpt" / RECIPE_FILE), [])
    tokenizer = Tokenizer.load(tmp_path / "ckpt" / TOKENIZER_FILE)
    model = BlueLM(recipe, tokenizer.image, TokenLoss)
    io.import_ckpt(model, f"hf://{language_folder}", output_path=tmp_path / "nemo")
    assert_equal(dict(export_state(tmp_path / "nemo")), dict(export_state(tmp_path / "ckpt")))
    BlueLM.exporter("hf", tmp_path / "nemo")(output_path=tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["parts"] == ["language"]
    wanted = dict(export_state(tmp_path / "ckpt", vocabulary=tokenizer.vocab_size))
    assert_equal(folder_state(tmp_path / "hf"), wanted)
