"""A quickstart that is ended hard takes its training with it."""

import os
import signal

import pytest

from tests.runtime.processes import anything_alive, start
from tests.runtime.test_resume import wait_for_step


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_no_training_is_left_behind(signum, corpus, tmp_path):
    (tmp_path / "corpus").symlink_to(corpus)
    process = start("-m", "nemo_bluelm.cli.main", "quickstart", "--out", tmp_path)
    wait_for_step(tmp_path / "runs" / "align_projector", 2, process)
    os.kill(process.pid, signum)
    process.wait(timeout=30)
    assert not anything_alive(process)
