"""A run that is killed and started again must end as if nothing had happened."""

import json
import shutil
import signal
import time

import pytest

from nemo_bluelm.runtime.run_dir import checkpoint_path
from tests.runtime.processes import TRAIN, anything_alive, finish, kill, run, start

STEPS = 24
# A resumed run must find the rates of every parameter group again.
OPTIMIZER = [
    *("optim.schedule=wsd", "optim.decay_steps=3", "optim.vision_layer_decay=0.9", "optim.parts.vision.lr=2e-3"),
    *("optim.parts.projector.lr=3e-3", "optim.parts.language.weight_decay=0.2"),
]

FIRST_TWO_LEFT_OUT = """
import sys
from nemo_bluelm.cli.main import main
from nemo_bluelm.runtime.environment import prepare
from nemo_bluelm.train.bad_steps import BadSteps
objection = BadSteps._objection
BadSteps._objection = lambda self, values: "bad" if self._trainer.global_step < 2 else objection(self, values)

prepare()
from nemo_bluelm.runtime import checkpoints
class Writing(checkpoints.Writing):
    def __init__(self, plan, talks, *rest):
        print("holds training up to plan" if talks else "is planned beside the training")
        super().__init__(plan, talks, *rest)
checkpoints.Writing = Writing
sys.exit(main(sys.argv[1:]))
"""


def command(corpus, run_dir, *overrides):
    settings = [f"data.root={corpus}", f"run_dir={run_dir}", f"train.steps={STEPS}", "train.save_every=5"]
    return [*TRAIN, "recipes/tiny/sft.yaml", *settings, "train.global_batch_size=2", *OPTIMIZER, *overrides]


def curve(run_dir):
    """(step, loss, grad_norm, lr, tokens by source) of every step, as written."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"], row["tokens_by_source"]) for row in rows]


def wait_for_step(run_dir, step, process, timeout=120):
    """Until the run has written its metrics of ``step``."""
    end = time.monotonic() + timeout
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= step):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"step {step} was not reached"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(corpus, forks, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    forks.run(*command(corpus, run_dir))
    return curve(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_sigkill_then_the_same_command_gives_bitwise_the_same_curve(processes, uninterrupted, corpus, forks, tmp_path):
    """Until the kill the folder is in use and a second run is refused; then it is free again."""
    layout = ["--nproc", str(processes)] if processes > 1 else []
    expected = uninterrupted
    if processes > 1:
        forks.run(*command(corpus, tmp_path / "whole"), ranks=processes)
        expected = curve(tmp_path / "whole")

    run_dir = tmp_path / "killed"
    process = start(*command(corpus, run_dir, *layout))
    wait_for_step(run_dir, 12, process)
    if processes == 1:
        process.send_signal(signal.SIGSTOP)  # or it would have ended before the second had started
        code, output = finish(start(*command(corpus, run_dir)), timeout=60)
        assert code == 2
        assert output.count("\n") == 1 and f"run_dir {run_dir} is in use" in output
    kill(process)
    process.wait()
    assert not anything_alive(process)
    assert 12 <= len(curve(run_dir)) < STEPS

    run(*command(corpus, run_dir, *layout))
    assert curve(run_dir) == expected
    assert [step for step, *_ in expected] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(uninterrupted, corpus, forks, tmp_path):
    """Ctrl-C and SIGTERM, on two runs side by side."""
    started = {}
    for signum in (signal.SIGINT, signal.SIGTERM):
        settings = command(corpus, tmp_path / signum.name, "train.save_every=1000")
        started[signum] = settings, start(*settings)
    for signum, (_, process) in started.items():
        wait_for_step(tmp_path / signum.name, 7, process)
        process.send_signal(signum)
    for signum, (_, process) in started.items():
        code, output = finish(process, timeout=60)
        assert code == 128 + signum
        assert "Traceback" not in output
        stopped_at = len(curve(tmp_path / signum.name))
        assert 7 <= stopped_at < STEPS
        saved = (tmp_path / signum.name / "checkpoints").iterdir()
        assert [folder.name for folder in saved] == [f"step_{stopped_at:08d}"]

    resumed = [forks.start(*settings) for settings, _ in started.values()]
    for signum, fork in zip(started, resumed):
        code, output = fork.finish(timeout=120)
        assert code == 0, output[-3000:]
        assert curve(tmp_path / signum.name) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("distributed_optimizer", ["false", pytest.param("true", marks=pytest.mark.long)])
def test_a_run_whose_first_updates_were_left_out_can_go_on(distributed_optimizer, corpus, forks, tmp_path):
    """From a checkpoint before the first update, and from one after it."""
    settings = ["train.steps=4", "optim.warmup_steps=1", "train.save_every=1", "train.keep_checkpoints=-1"]
    settings += ["train.skip_bad_steps=2", f"parallel.distributed_optimizer={distributed_optimizer}"]
    whole = tmp_path / "whole"
    _, _, train, *arguments = command(corpus, whole, *settings)
    output = run("-c", FIRST_TWO_LEFT_OUT, train, *arguments)
    assert output.count("is left out") == 2
    assert output.count("is planned beside the training") == 4 and "holds training up" not in output
    for step in (2, 3):
        again = tmp_path / str(step)
        for done in range(1, step + 1):
            shutil.copytree(checkpoint_path(whole, done), checkpoint_path(again, done))
        forks.run(*command(corpus, again, *settings))
        assert curve(again) == curve(whole)[step:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "four, two",
    [
        pytest.param([], [], marks=pytest.mark.long),
        (["parallel.distributed_optimizer=true"], ["parallel.distributed_optimizer=true", "parallel.tensor=2"]),
    ],
)
def test_a_run_of_four_ranks_goes_on_with_two(four, two, corpus, forks, tmp_path):
    """The global batches are the same, so the curve is that of any number of ranks, to rounding."""
    layout = ["train.global_batch_size=4", "optim.schedule=constant", "optim.decay_steps=null", "optim.warmup_steps=2"]
    forks.run(*command(corpus, tmp_path / "alone", *layout, "train.steps=6"))
    run(*command(corpus, tmp_path / "run", *layout, *four, "train.steps=3", "--nproc", "4"))
    forks.run(*command(corpus, tmp_path / "run", *layout, *two, "train.steps=6"), ranks=2)
    expected, found = curve(tmp_path / "alone"), curve(tmp_path / "run")
    assert [row[0] for row in found] == list(range(1, 7))
    assert [row[1] for row in found] == pytest.approx([row[1] for row in expected], rel=1e-5)
    assert [row[4] for row in found] == [row[4] for row in expected]


@pytest.mark.slow
def test_a_complete_run_says_so_and_a_changed_recipe_is_refused(corpus, forks, tmp_path):
    run_dir = tmp_path / "done"
    short = ["train.steps=4", "optim.warmup_steps=1", "train.keep_checkpoints=1"]
    forks.run(*command(corpus, run_dir, *short))
    assert [folder.name for folder in (run_dir / "checkpoints").iterdir()] == ["step_00000004"]
    assert "is complete" in run(*command(corpus, run_dir, *short))

    changed = {
        "model.language.num_layers=3": "model.language.num_layers is 3",
        "seed=5": "seed is 5",
        "train.global_batch_size=4": "train.global_batch_size is 4",
    }
    for override, expected in changed.items():
        code, output = finish(start(*command(corpus, run_dir, *short, override)), timeout=60)
        assert code == 2
        assert output.count("\n") == 1 and expected in output and "run_dir" in output
