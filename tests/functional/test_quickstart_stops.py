"""A quickstart that is ended hard takes its training with it."""

import os
import signal

import pytest

from tests.runtime.processes import anything_alive, start
from tests.runtime.test_resume import wait_for_step


@pytest.mark.slow
def test_no_training_is_left_behind(corpus, tmp_path):
    """By SIGTERM and by SIGKILL, on two quickstarts side by side."""
    started = {}
    for signum in (signal.SIGTERM, signal.SIGKILL):
        out = tmp_path / signum.name
        out.mkdir()
        (out / "corpus").symlink_to(corpus)
        started[signum] = start("-m", "nemo_bluelm.cli.main", "quickstart", "--out", out)
    for signum, process in started.items():
        wait_for_step(tmp_path / signum.name / "runs" / "recall", 2, process)
        os.kill(process.pid, signum)
        process.wait(timeout=30)
        assert not anything_alive(process)
