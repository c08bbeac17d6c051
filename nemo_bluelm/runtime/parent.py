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
    """End this process and its forks when the one that marked it ends, even by SIGKILL; nothing in an unmarked process.

    Megatron-Core writes checkpoints from forks, and one of them, which keeps their results, would wait for ever.
    """
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    library, me = ctypes.CDLL(None), os.getpid()

    def end_with(parent: int) -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)

    def in_fork() -> None:
        nonlocal me
        parent, me = me, os.getpid()
        end_with(parent)

    end_with(int(parent))
    os.register_at_fork(after_in_child=in_fork)
