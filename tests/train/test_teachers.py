"""Which checkpoints may teach a run, and how the loss goes from data to teacher."""

import pytest

from nemo_bluelm.config.compose import load_recipe, to_yaml
from nemo_bluelm.errors import UserError
from nemo_bluelm.train.teachers import check_teacher


@pytest.fixture
def taught(recipe_file, tmp_path):
    """The student's recipe with a teacher of other keys: ``taught(teacher's overrides, student's overrides)``."""

    def make(its=(), mine=()):
        folder = tmp_path / "teacher"
        (folder / "weights").mkdir(parents=True)
        (folder / "tokenizer.json").write_bytes(b"the tokenizer")
        (folder / "recipe.yaml").write_text(to_yaml(load_recipe(recipe_file(), list(its))))
        return load_recipe(recipe_file(), [f"distill.teacher={folder}", *mine])

    return make


@pytest.mark.parametrize(
    "its, mine, message",
    [
        (["model.language.vocab_size=4096"], [], "model.language.vocab_size is 2048, but .* was trained with 4096"),
        (["train.lora.rank=4"], [], "has LoRA adapters, which its weights don't have yet; .*nemo-bluelm merge"),
        (["model.geometry.tile=84"], [], "model.geometry.tile is 56, but .* was trained with 84"),
        (
            ["model.language.yarn.original_max_position_embeddings=256", "data.sequence_length=128"],
            [],
            "can't read the run's packs: data.sequence_length is 512, longer than the 256 positions",
        ),
        (
            ["model.language.num_attention_heads=3", "model.language.num_query_groups=1"],
            ["parallel.tensor=2"],
            "can't be laid out as the student is: .*num_attention_heads.*; set distill.split_teacher=false",
        ),
    ],
)
def test_refused(its, mine, message, taught):
    with pytest.raises(UserError, match=message):
        check_teacher(taught(its, mine), b"the tokenizer")


def test_another_tokenizer_is_refused(taught):
    with pytest.raises(UserError, match="is not the tokenizer that distill.teacher .* was trained with; use "):
        check_teacher(taught(), b"another one")


def test_a_teacher_that_is_whole_needs_no_split(taught):
    its = ["model.language.num_attention_heads=3", "model.language.num_query_groups=1"]
    check_teacher(taught(its, ["parallel.tensor=2", "distill.split_teacher=false"]), b"the tokenizer")


def test_weight_and_temperature_go_in_a_line():
    from nemo_bluelm.runtime.environment import prepare

    prepare()
    from nemo_bluelm.train.distill import ramp

    assert [ramp(1.0, 0.0, step, 5) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [ramp(0.3, None, step, 5) for step in (0, 4)] == [0.3, 0.3]
    assert (ramp(2.0, 1.0, 0, 1), ramp(2.0, 1.0, 9, 5)) == (2.0, 1.0)
