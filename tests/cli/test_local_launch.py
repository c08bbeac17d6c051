"""``train --nproc N``: ranks start, fail, are interrupted and die together; what is said is said once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT, one_line

FAKE = Path(__file__).parent / "fake_training"
COMMAND = [sys.executable, "-m", "nemo_bluelm.cli.main", "train", "tiny/sft", "--nproc", "2"]


@pytest.fixture
def start(tmp_path):
    """Starts a two-rank job whose training is replaced: ``start("works") -> Popen``; stops it in the end."""
    jobs = []

    def run(behaviour: str, command=COMMAND, cwd=CHECKOUT) -> subprocess.Popen:
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "OMP_NUM_THREADS")}
        env |= {
            "PYTHONPATH": f"{FAKE}{os.pathsep}{CHECKOUT}",
            "FAKE_TRAINING": behaviour,
            "FAKE_OUT": str(tmp_path),
            "TMPDIR": str(tmp_path),
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        jobs.append(subprocess.Popen(command, cwd=cwd, env=env, **pipes))
        return jobs[-1]

    yield run
    for job in jobs:
        job.kill()
        job.wait()


def _wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_all_ranks_run_with_their_share_of_the_cores(start, tmp_path):
    job = start("works")
    out, err = job.communicate(timeout=120)
    assert (job.returncode, err) == (0, "")
    threads = {(tmp_path / f"rank{rank}").read_text().split()[1] for rank in (0, 1)}
    assert threads == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    assert not list(tmp_path.glob("nemo-bluelm-*"))


def test_files_where_ranks_start_are_none_of_their_modules(start, tmp_path):
    (tmp_path / "html.py").write_text("raise SystemExit(3)")
    command = [COMMAND[0], "-P", *COMMAND[1:]]  # the parent as the installed command: without the folder it runs in
    job = start("works", command, tmp_path)
    _, err = job.communicate(timeout=120)
    assert (job.returncode, err) == (0, "")


@pytest.mark.parametrize(
    "behaviour, expected",
    [("mistake", "data.root: no such folder"), ("mistake of rank 1", "shard 7: not a tar file")],
)
def test_a_mistake_is_told_once_whichever_rank_meets_it(start, behaviour, expected):
    job = start(behaviour)
    _, err = job.communicate(timeout=120)
    assert one_line(job.returncode, err) == expected


def test_a_bug_keeps_its_traceback_and_the_rank_is_named(start):
    job = start("bug of rank 1")
    _, err = job.communicate(timeout=120)
    assert job.returncode == 1
    assert err.count("Traceback") == 1 and "RuntimeError: boom" in err
    assert err.splitlines()[-1] == "nemo-bluelm: error: rank 1 failed with exit code 1; its own message is above"


def test_a_killed_rank_is_named_and_ends_the_others(start, tmp_path):
    job = start("rank 1 killed")
    _, err = job.communicate(timeout=120)
    assert job.returncode == 128 + signal.SIGKILL
    assert err == "nemo-bluelm: error: rank 1 was ended by SIGKILL\n"
    assert not _alive(int((tmp_path / "rank0").read_text().split()[0]))


@pytest.mark.parametrize(
    "number, code, said",
    [
        (signal.SIGINT, 130, "nemo-bluelm: interrupted\n"),
        (signal.SIGTERM, 143, "nemo-bluelm: error: ended by SIGTERM\n"),
    ],
)
def test_signals_reach_the_ranks(start, tmp_path, number, code, said):
    job = start("saves on signal")
    _wait_for(lambda: len(list(tmp_path.glob("ready*"))) == 2)
    job.send_signal(number)
    _, err = job.communicate(timeout=60)
    assert (job.returncode, err) == (code, said)
    assert {(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)} == {str(int(number))}


def test_ranks_die_with_a_killed_parent(start, tmp_path):
    job = start("sleeps")
    _wait_for(lambda: len(list(tmp_path.glob("rank*"))) == 2)
    time.sleep(0.2)  # the files are written, not only made
    pids = [int((tmp_path / f"rank{rank}").read_text().split()[0]) for rank in (0, 1)]
    assert all(map(_alive, pids))
    job.kill()
    _wait_for(lambda: not any(map(_alive, pids)), seconds=10)
