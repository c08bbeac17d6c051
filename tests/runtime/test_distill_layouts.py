"""Distillation is one in every layout: beside a teacher split as the student or whole on each rank, and from disk."""

import pytest

from tests.runtime.layouts import Run, compare, train_all
from tests.runtime.processes import TRAIN, run

SHAPE = (
    *("model.language.hidden_size=96", "model.language.ffn_hidden_size=160", "model.language.num_layers=2"),
    *("model.language.num_attention_heads=4", "model.language.num_query_groups=2", "model.language.kv_channels=16"),
)
WEIGHTS = ("distill.weight=0.9", "distill.weight_end=0.2")
TEMPERATURES = ("distill.temperature=2", "distill.temperature_end=1")
TOP_K, LAST_K = 64, 8
SHARDS = [f"data.sources.{name}.shards=[{name}-train-0000.tar]" for name in ("digits", "photos", "text")]


@pytest.fixture(scope="module")
def taught(corpus, tmp_path_factory, forks):
    """Every way to learn from one teacher, on one process and on two."""
    folder = tmp_path_factory.mktemp("distill")
    data = [f"data.root={corpus}", f"data.index={folder / 'index'}", "data.sequence_length=128", *SHARDS]
    teacher = folder / "teacher"
    settings = ["train.steps=4", "train.global_batch_size=1", "optim.warmup_steps=0", "optim.lr=3e-3"]
    forks.run(*TRAIN, "tiny/sft", *data, *SHAPE, *settings, f"run_dir={teacher}")
    run("tools/make_teacher_logits.py", teacher, "tiny/sft", folder / "logits", *data, "--top-k", TOP_K)
    online = [*SHARDS, f"distill.teacher={teacher}", *WEIGHTS, *TEMPERATURES]
    few = [*SHARDS, f"distill.teacher={teacher}", *WEIGHTS, f"distill.top_k={TOP_K}", f"distill.top_k_end={LAST_K}"]
    stored = [*SHARDS, f"distill.logits={folder / 'logits'}", *WEIGHTS, *few[-2:]]
    constant = few[:-1]
    tensor = ["parallel.tensor=2"]
    layouts = {
        **{"one": online, "one_few": few, "one_stored": stored, "constant": constant},
        "tensor_online": [*online, *tensor, "parallel.sequence=true"],
        "tensor_whole": [*online, *tensor, "distill.split_teacher=false"],
        "tensor_stored": [*stored, *tensor],
        "context_few": [*few, "parallel.context=2"],
        "context_stored": [*stored, "parallel.context=2"],
    }
    return train_all(corpus, folder, 2, layouts, timeout=500)


@pytest.mark.long
@pytest.mark.parametrize(
    "name, reference",
    [
        *(("tensor_online", "one"), ("tensor_whole", "one")),
        *(("context_few", "one_few"), ("tensor_stored", "one_stored")),
        ("context_stored", "one_stored"),
    ],
)
def test_every_layout_learns_the_same(name, reference, taught):
    compare(Run(taught / name), Run(taught / reference))


@pytest.mark.long
def test_stored_logits_teach_what_the_teacher_does(taught):
    """To the precision of fp16 scores."""
    assert Run(taught / "one_stored").losses == pytest.approx(Run(taught / "one_few").losses, rel=1e-3)


@pytest.mark.long
def test_temperature_and_number_of_tokens_matter(taught):
    """The references differ, so that the comparisons above compare something."""
    one, few, constant = (Run(taught / name).losses for name in ("one", "one_few", "constant"))
    assert all(abs(a - b) > 1e-2 for a, b in zip(one, few))
    assert constant[0] == pytest.approx(few[0], rel=1e-5) and abs(constant[-1] - few[-1]) > 1e-3
