"""Which differences between a recipe and a checkpoint are refused, and which are not."""

import re

import pytest

from nemo_bluelm.config.compose import load_recipe, to_yaml
from nemo_bluelm.config.schema import Part
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.run_dir import Origin
from nemo_bluelm.train.continuity import (
    check_frozen,
    check_init,
    check_resume,
    check_shapes,
    origin_parts,
    resume_notices,
)

TOKENIZER = b"the same"
NORM = "model.projector.layer_norm"


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of tiny/sft, as far as these checks look at one."""
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZER)
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe(tmp_path)))
    return tmp_path


def start(checkpoint, parts=tuple(Part)):
    return Origin("init_from", checkpoint, parts)


def recipe(folder, *overrides):
    fixed = [f"data.root={folder / 'corpus'}", f"run_dir={folder}", f"init_from={folder}"]
    return load_recipe("tiny/sft", [*fixed, *overrides])


@pytest.mark.parametrize(
    "override",
    ["train.steps=999", "parallel.tensor=2", "train.save_every=3", "data.root=/moved", "name=other"],
)
def test_resume_allows(override, checkpoint):
    check_resume(recipe(checkpoint, override), checkpoint)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("init_from=/else", "init_from is /else, but .* goes on from its own .*; .* choose another run_dir"),
        ("init_vision_from=/eyes", "init_vision_from is /eyes, but the run was started with None"),
        ("train.steps=999", "train.steps is 999, but was 280 .*: from there the learning rate"),
    ],
)
def test_what_a_resumed_run_does_not_take_from_the_recipe_is_told(override, told, checkpoint):
    (notice,) = resume_notices(recipe(checkpoint, override), checkpoint)
    assert re.search(told, notice)


def test_an_unchanged_recipe_resumes_without_a_word(checkpoint):
    assert resume_notices(recipe(checkpoint), checkpoint) == []


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.vision.num_layers=3", "model.vision.num_layers"),
        ("data.sequence_length=256", "data.sequence_length"),
        ("data.sources.text.weight=9", "data.sources.text.weight"),
        ("train.freeze=[vision]", "train.freeze"),
        ("precision=bf16", "precision.dtype"),
        ("parallel.context=2", "parallel.context"),
        ("optim.lr=1e-5", "optim.lr"),
        ("seed=1", "seed"),
    ],
)
def test_resume_refuses(override, key, checkpoint):
    with pytest.raises(UserError, match=rf"^{key} is .* was started with .*run_dir"):
        check_resume(recipe(checkpoint, override), checkpoint)


@pytest.mark.parametrize(
    "override",
    [
        *("model.geometry.max_cols=1", "data.sequence_length=256", "model.language.yarn.factor=8", "seed=1"),
        *("model.vision.num_layers=1", "train.freeze=[vision]", "train.lora.rank=4"),
    ],
)
def test_init_allows(override, checkpoint):
    check_init(recipe(checkpoint, override), start(checkpoint), TOKENIZER)


@pytest.mark.parametrize("key", ["model.language.ffn_hidden_size", "model.vision.hidden_size", "model.geometry.tile"])
def test_init_refuses_other_shapes(key, checkpoint):
    with pytest.raises(UserError, match=rf"^{key} is 112, but init_from .* trained with"):
        check_init(recipe(checkpoint, f"{key}=112"), start(checkpoint), TOKENIZER)


@pytest.mark.parametrize(
    ("parts", "refused"),
    [
        ("language", ["model.language.hidden_size"]),
        ("vision", ["model.vision.hidden_size", "model.geometry.tile"]),
        ("projector", ["model.language.hidden_size", "model.vision.hidden_size", "model.geometry.merge", NORM]),
    ],
)
def test_shapes_of_parts_that_the_checkpoint_lacks_do_not_matter(parts, refused, checkpoint):
    (checkpoint / "weights").mkdir()
    (checkpoint / "weights" / ".metadata").write_bytes(b"...module.%s.weight..." % parts.encode())
    values = {"model.language.hidden_size": 96, "model.vision.hidden_size": 96, "model.geometry.tile": 84}
    for key, value in (values | {"model.geometry.merge": 1, NORM: False}).items():
        changed = recipe(checkpoint, f"{key}={value}")
        if key in refused:
            with pytest.raises(UserError, match=rf"^{key} is {value}, but init_from"):
                check_init(changed, start(checkpoint), TOKENIZER)
        else:
            check_init(changed, start(checkpoint), TOKENIZER)


def test_adapters_are_not_lost(checkpoint):
    origin = recipe(checkpoint, "train.lora.rank=4")
    check_shapes(recipe(checkpoint, "train.lora.rank=4"), origin)
    with pytest.raises(UserError, match="^train.lora.rank is 0, but init_from .* adapters with 4; .*merge"):
        check_shapes(recipe(checkpoint), origin)
    with pytest.raises(UserError, match="^train.lora.alpha is 64.0, but init_from .* adapters with 32.0"):
        check_shapes(recipe(checkpoint, "train.lora.rank=4", "train.lora.alpha=64"), origin)
    check_shapes(recipe(checkpoint, "train.lora.rank=4", "train.lora.dropout=0.5"), origin)


def test_init_refuses_another_tokenizer(checkpoint):
    with pytest.raises(UserError, match="data.tokenizer .* is not the tokenizer that init_from"):
        check_init(recipe(checkpoint), start(checkpoint), b"another")


def test_the_vision_transformer_may_come_from_elsewhere(checkpoint):
    whole = recipe(checkpoint)
    assert origin_parts(whole) == {"init_from": tuple(Part)}
    both = recipe(checkpoint, "init_vision_from=siglip")
    assert origin_parts(both) == {"init_from": (Part.projector, Part.language), "init_vision_from": (Part.vision,)}
    assert origin_parts(recipe(checkpoint, "init_from=null", "init_vision_from=siglip")) == {
        "init_vision_from": (Part.vision,)
    }
    assert origin_parts(recipe(checkpoint, "init_from=null")) == {}
    # Another ViT than that of init_from may have another width.
    wide = recipe(checkpoint, "init_vision_from=siglip", "model.vision.hidden_size=96")
    check_init(wide, start(checkpoint, (Part.language,)), TOKENIZER)
    with pytest.raises(UserError, match=r"^model.vision.hidden_size is 96, but init_vision_from siglip was trained"):
        check_init(wide, Origin("init_vision_from", checkpoint, (Part.vision,)), TOKENIZER)


def test_what_no_checkpoint_has_is_not_frozen(checkpoint):
    (checkpoint / "weights").mkdir()
    (checkpoint / "weights" / ".metadata").write_bytes(b"...module.language.weight...")
    frozen = recipe(checkpoint, "train.freeze=[vision,language]")
    with pytest.raises(
        UserError, match=r"^train.freeze has vision, .*no weights of it in init_from .*init_vision_from"
    ):
        check_frozen(frozen, [start(checkpoint)])
    check_frozen(recipe(checkpoint, "train.freeze=[language]"), [start(checkpoint)])
    check_frozen(frozen, [])
