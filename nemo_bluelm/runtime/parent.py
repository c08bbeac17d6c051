"""Processes of ours that must not outlive the one that started them. Standard library only."""

import ctypes
import os
import signal

PARENT = "NEMO_BLUELM_PARENT_PID"  # environment variable that marks such a process
_PR_SET_PDEATHSIG = 1


def bound_to_this_process() -> dict[str, str]:
    """The environment for a child that is to end with this process."""
    return {PARENT: str(os.getpid())}


def follow_parent() -> None:
    """End this process when the one that marked it ends, even by SIGKILL. Does nothing in an unmarked process."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before the line above
        os._exit(1)
