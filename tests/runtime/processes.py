"""Runs commands in a process group of their own that a test can end, and that must not outlive it."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
MARK = "NEMO_BLUELM_TEST_MARK"  # inherited by all descendants; ranks have sessions of their own, so a group misses them
TRAIN = ("-m", "nemo_bluelm.cli.main", "train")


def start(*arguments: str, threads: int = 1) -> subprocess.Popen:
    """``python ARGUMENTS`` in the checkout, as the leader of a new process group; stdout and stderr in one pipe."""
    mark = uuid.uuid4().hex
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), MARK: mark}
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=CHECKOUT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    process.mark = mark
    return process


def finish(process: subprocess.Popen, timeout: float) -> tuple[int, str]:
    """Exit code and output; the whole group is killed at the timeout (seconds), which fails the test."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {timeout} s; last output:\n{output[-2000:]}") from None
    assert not anything_alive(process), "processes are left behind"
    return process.returncode, output


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the process and its group; ranks have sessions of their own and must follow by themselves."""
    os.killpg(process.pid, signal.SIGKILL)


def anything_alive(process: subprocess.Popen, patience: float = 5.0) -> bool:
    """Whether a descendant is still there after ``patience`` seconds."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if not descendants(process):
            return False
        time.sleep(0.1)
    return True


def descendants(process: subprocess.Popen) -> list[int]:
    """Living processes that carry the mark of ``process``, itself included; zombies don't count."""
    wanted = f"{MARK}={process.mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it ended while we looked
            continue
    return found


def run(*arguments: str, timeout: float = 240, threads: int = 1) -> str:
    """Output of a command that must succeed."""
    code, output = finish(start(*arguments, threads=threads), timeout)
    assert code == 0, output[-3000:]
    return output


def torchrun(processes: int, *arguments: str, timeout: float = 240) -> str:
    """Output of a script under torchrun on a free port."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    return run(*launcher, *arguments, timeout=timeout)
