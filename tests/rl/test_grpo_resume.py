"""A GRPO run that is killed in any of its phases and started again must end as if nothing had happened."""

import signal
import time

import pytest

from tests.rl.grpo_runs import beginner, command, curve, forks, write_recipe  # noqa: F401
from tests.runtime.processes import anything_alive, finish, kill, start

pytestmark = pytest.mark.slow

# Four updates a GRPO step, which has 16 replies; checkpoints come between two updates.
SETTINGS = [
    *("train.steps=12", "train.global_batch_size=8", "grpo.num_iterations=2", "train.save_every=3"),
    *("grpo.loss.reference_policy_kl_penalty=0.05", "grpo.generation.batch=4"),
]


@pytest.fixture(scope="module")
def runs(corpus, beginner, forks, tmp_path_factory):  # noqa: F811
    """The curve of a run that nothing interrupts, and how to start another."""
    folder = tmp_path_factory.mktemp("resumed")
    recipe = write_recipe(folder, f"{{held_up: {{folder: {folder}}}}}")

    def arguments(name, *overrides):
        return command(recipe, corpus, beginner, folder / name, *SETTINGS, *overrides)

    forks.run(*arguments("whole"))
    return folder, curve(folder / "whole"), arguments, forks


def wait(process, condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the run didn't come to where it should be killed"
        time.sleep(0.005)


def asked(folder):
    return (folder / "asked").stat().st_size if (folder / "asked").exists() else 0


def steps_done(run_dir):
    """Those whose figures are written: the run is in the second one after them."""
    metrics = run_dir / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


# When to kill: once so many rewards were asked for, or so many steps' figures are written. 16 replies are a GRPO step.
@pytest.mark.parametrize(
    "phase, rewards, hold, steps",
    [("rollout", 18, None, 0), ("reward", 30, 28, 0), ("update", 0, None, 5)],
)
def test_sigkill_then_the_same_command_gives_bitwise_the_same_curve(phase, rewards, hold, steps, runs):
    folder, expected, arguments, forks = runs  # noqa: F811
    (folder / "asked").unlink(missing_ok=True)
    if hold:
        (folder / "hold").write_text(str(rewards))
    process = start(*arguments(phase))
    wait(process, lambda: asked(folder) >= rewards and steps_done(folder / phase) >= steps)
    if hold:
        time.sleep(1)  # all else is written by then: it waits for this reward
    kill(process)
    process.wait()
    assert not anything_alive(process)
    (folder / "hold").unlink(missing_ok=True)
    assert steps_done(folder / phase) < 12

    forks.run(*arguments(phase))
    assert curve(folder / phase) == expected
    assert [row["step"] for row in expected] == list(range(1, 13))


def test_sigterm_between_two_updates_of_a_step_saves_and_the_same_command_goes_on(runs):
    """The checkpoint is the only one; the replies that it goes on with lie in the run's folder, however old it is."""
    folder, expected, arguments, forks = runs  # noqa: F811
    settings = arguments("ended", "train.save_every=1000")
    process = start(*settings)
    wait(process, lambda: steps_done(folder / "ended") >= 4)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process, timeout=60)
    assert code == 128 + signal.SIGTERM, output[-2000:]
    assert 4 < steps_done(folder / "ended") < 12
    forks.run(*settings)
    assert curve(folder / "ended") == expected


def test_the_replies_that_the_newest_checkpoint_needs_are_kept(runs):
    """It is that of step 9, in GRPO step 2, when a kill in the last updates of the run makes it the newest."""
    folder, expected, arguments, forks = runs  # noqa: F811
    settings = arguments("long", "train.steps=20", "train.keep_checkpoints=-1", "train.save_every=9")
    forks.run(*settings)
    longer = curve(folder / "long")
    assert longer[:12] == expected
    kept = {path.name for path in (folder / "long" / "rollouts").glob("step_*")}
    assert kept == {"step_00000002", "step_00000003", "step_00000004"}
    for checkpoint in (folder / "long" / "checkpoints").glob("step_*"):
        if checkpoint.name != "step_00000009":
            checkpoint.rename(folder / f"later_{checkpoint.name}")
    forks.run(*settings)
    assert curve(folder / "long") == longer


def test_replies_that_are_lost_are_told(runs):
    folder, _, arguments, forks = runs  # noqa: F811
    settings = arguments("lost", "train.save_every=1", "train.keep_checkpoints=-1")
    forks.run(*settings)
    for checkpoint in (folder / "lost" / "checkpoints").glob("step_*"):
        if checkpoint.name != "step_00000010":
            checkpoint.rename(folder / f"lost_{checkpoint.name}")
    (folder / "lost" / "rollouts" / "step_00000002" / "rank_00000.pt").write_bytes(b"cut")
    code, output = forks.start(*settings).finish(timeout=120)
    assert code == 2
    last = output.splitlines()[-1]
    assert "step_00000002" in last and "between two GRPO steps" in last and "Traceback" not in output
