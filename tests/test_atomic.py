"""A new folder is there whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_bluelm.atomic import new_folder
from nemo_bluelm.errors import UserError


def test_it_is_there_once_it_is_whole(tmp_path):
    for path in (tmp_path / "deep" / "out", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with new_folder(path) as partial:
            (partial / "file").write_text("whole")
            assert not (path / "file").exists() and partial.parent == path.parent
        assert (path / "file").read_text() == "whole"
        assert not partial.exists()
    assert (tmp_path / "empty").stat().st_mode == (tmp_path / "deep").stat().st_mode, "others may read it as any folder"


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), UserError("no"), ValueError("a bug")], ids=type)
def test_nothing_is_left_of_a_failure(failure, tmp_path):
    with pytest.raises(type(failure)), new_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("half")
        raise failure
    assert os.listdir(tmp_path) == []


def test_sigterm_leaves_nothing_either(tmp_path):
    script = (
        "import os, pathlib, signal, sys\nfrom nemo_bluelm.atomic import new_folder\n"
        "with new_folder(pathlib.Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').mkdir()\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr, os.listdir(tmp_path)) == (128 + signal.SIGTERM, "", [])
    with new_folder(tmp_path / "out"):
        pass
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_full_disk_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match="out can't be written: No space left on device; choose another folder"):
        with new_folder(tmp_path / "out"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match="/proc/none/out can't be written"):
        with new_folder(Path("/proc/none/out")):
            raise AssertionError("there is no such place")


def test_what_is_there_stays(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="exists and is not an empty folder; remove it or choose another"):
            with new_folder(path):
                raise AssertionError("nothing is made beside it")
    with pytest.raises(UserError, match="out can't be written: Directory not empty"):
        with new_folder(tmp_path / "out"):  # another process is sooner
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "file").write_text("another's")
    assert sorted(os.listdir(tmp_path)) == ["file", "out"] and (tmp_path / "out" / "file").read_text() == "another's"


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path, monkeypatch):
    out = tmp_path / "out"
    script = (
        "import os, pathlib, signal, sys\nfrom nemo_bluelm.atomic import new_folder\n"
        "with new_folder(pathlib.Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').mkdir()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", script, str(out)])
    assert killed.wait() == -signal.SIGKILL and not out.exists() and len(os.listdir(tmp_path)) == 1
    monkeypatch.setattr(os, "getpid", lambda: killed.pid)  # the worst case: the number comes again
    with new_folder(out) as partial:
        assert os.listdir(partial) == []
        (partial / "file").write_text("whole")
    assert os.listdir(out) == ["file"] and os.listdir(tmp_path) == ["out"]
