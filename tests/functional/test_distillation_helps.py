"""A student pruned from a teacher and taught by it needs fewer tokens than one from scratch."""

import pytest

from nemo_bluelm.evaluate.learning import entropies, tokens_seen, tokens_to
from tests.runtime.processes import TRAIN, run

STEPS = 120


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_fewer_tokens_than_from_scratch(corpus, tmp_path):
    data = [f"data.root={corpus}", f"data.index={tmp_path / 'index'}"]
    teacher, pruned, taught, alone = (tmp_path / name for name in ("teacher", "pruned", "taught", "alone"))
    student = [*TRAIN, "tiny/text_pretrain", *data, f"train.steps={STEPS}"]
    run(*TRAIN, "tiny/text_teacher", *data, f"train.steps={2 * STEPS}", f"run_dir={teacher}", timeout=900)
    run(*TRAIN[:2], "prune", teacher, pruned, "--recipe", "tiny/text_pretrain", *data)
    run(*student, f"init_from={pruned}", f"distill.teacher={teacher}", f"run_dir={taught}", timeout=600)
    nothing = ["init_from=null", "distill.teacher=null", "distill.weight=1"]
    run(*student, *nothing, f"run_dir={alone}", timeout=600)

    goal = entropies(alone)[-1]
    share = tokens_to(taught, goal) / tokens_seen(alone)[-1]
    print(f"cross-entropy {goal:.3f} is reached with {share:.0%} of the tokens")
    assert share < 0.7
