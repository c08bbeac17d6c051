"""Locks on files, between the processes of all nodes."""

import errno
import fcntl
from pathlib import Path

from nemo_bluelm.errors import UserError

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def hold_lock(file: int, folder: Path, wait: bool = True) -> None:
    """Hold a file's lock until it is closed.

    Args:
        file: descriptor, open for writing.
        folder: what the lock guards, for messages.
        wait: for another that holds it.

    Raises:
        BlockingIOError: another process or thread holds it, and ``wait`` is false.
        UserError: the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise UserError(
            f"{folder} is on a file system without locks ({error.strerror}); have it mounted with them (Lustre: "
            "-o flock), or choose a folder elsewhere"
        ) from error
