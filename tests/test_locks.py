"""A lock is held until its file is closed; a file system without locks is told in one line."""

import errno
import fcntl
import os

import pytest

from nemo_bluelm.errors import UserError
from nemo_bluelm.locks import hold_lock


def test_it_is_held_until_its_file_is_closed(tmp_path):
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        hold_lock(first.fileno(), tmp_path)
        with pytest.raises(BlockingIOError):
            hold_lock(second.fileno(), tmp_path, wait=False)
        first.close()
        hold_lock(second.fileno(), tmp_path)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        open(tmp_path / "lock", "w") as file,
        pytest.raises(UserError, match=f"{tmp_path} is on a file system without"),
    ):
        hold_lock(file.fileno(), tmp_path)
