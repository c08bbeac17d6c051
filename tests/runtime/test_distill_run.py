"""A student from pruning to resuming: what is pruned starts a run, the teacher leaves no trace in its checkpoints."""

import pytest

from nemo_bluelm.runtime.environment import prepare

prepare()

from megatron.core import dist_checkpointing  # noqa: E402

from nemo_bluelm.runtime.run_dir import newest, read_metrics  # noqa: E402
from tests.conftest import one_line  # noqa: E402
from tests.runtime.processes import TRAIN, finish, run, start  # noqa: E402

WIDE = [
    *("model.language.hidden_size=96", "model.language.ffn_hidden_size=160"),
    *("model.language.num_attention_heads=4", "model.language.num_query_groups=4", "model.language.kv_channels=16"),
]
NARROW = [
    *("model.language.hidden_size=64", "model.language.ffn_hidden_size=96"),
    *("model.language.num_attention_heads=4", "model.language.num_query_groups=2", "model.language.kv_channels=16"),
]
SHORT = ["train.global_batch_size=1", "optim.warmup_steps=0", "optim.schedule=constant", "data.sequence_length=128"]


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory, forks):
    """A teacher's run and what was pruned from it."""
    folder = tmp_path_factory.mktemp("student")
    data = [f"data.root={corpus}", f"data.index={folder / 'index'}", *SHORT]
    forks.run(*TRAIN, "tiny/text_teacher", *data, *WIDE, "train.steps=2", f"run_dir={folder / 'teacher'}")
    student = ["--recipe", "tiny/text_pretrain", *data, *NARROW, "--packs", "3"]
    run(*TRAIN[:2], "prune", folder / "teacher", folder / "pruned", *student)
    return folder, data


@pytest.mark.slow
def test_a_student_that_is_stopped_learns_the_same(made, forks):
    folder, data = made
    keys = [f"init_from={folder / 'pruned'}", f"distill.teacher={folder / 'teacher'}", "distill.weight_end=0.1"]
    student = [*TRAIN, "tiny/text_pretrain", *data, *NARROW, *keys, "train.steps=4", "train.save_every=2"]
    forks.run(*student, f"run_dir={folder / 'whole'}")
    forks.run(*student, "train.keep_checkpoints=-1", f"run_dir={folder / 'stopped'}")
    last = newest(folder / "stopped")
    last.rename(folder / "gone")  # as if it had been killed before it saved
    forks.run(*student, f"run_dir={folder / 'stopped'}")
    curves = [
        [(row["loss"], row["cross_entropy"], row["divergence"]) for row in read_metrics(folder / name)]
        for name in ("whole", "stopped")
    ]
    assert len(curves[0]) == 4 and curves[0] == curves[1]
    for step, (loss, entropy, apart) in enumerate(curves[0]):
        weight = 0.5 - 0.4 * step / 3
        assert loss == pytest.approx((1 - weight) * entropy + weight * apart, rel=1e-5)

    saved, pruned = (
        dist_checkpointing.load_tensors_metadata(str(place / "weights")) for place in (last, folder / "pruned")
    )
    mine = {key: entry.global_shape for key, entry in saved.items() if not key.startswith("optimizer")}
    assert mine == {key: entry.global_shape for key, entry in pruned.items()}


@pytest.mark.slow
def test_pruning_again_keeps_what_is_there(made):
    folder, data = made
    student = ["--recipe", "tiny/text_pretrain", *data, *NARROW, "--packs"]
    again = [*TRAIN[:2], "prune", folder / "teacher", folder / "pruned", *student]
    assert "already holds 2 layers of hidden size 64" in run(*again, "3")
    code, output = finish(start(*again, "4"), timeout=120)
    assert "was pruned with packs 3, and now it is 4; remove it" in one_line(code, output)
    (folder / "foreign").mkdir(exist_ok=True)
    code, output = finish(start(*again[:4], folder / "foreign", *student, "3"), timeout=120)
    assert "exists and was not made by 'nemo-bluelm prune'" in one_line(code, output)
