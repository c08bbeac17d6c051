"""The process that rewards replies one after another, for ``pool.py``, which ends it where it takes too long."""

import contextlib
import ctypes
import os
import signal
import sys
import warnings
from importlib import import_module
from multiprocessing.connection import Connection

_PARENT_DEATH_SIGNAL = 1


def main() -> None:
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    warnings.filterwarnings("ignore")  # of the libraries that rewards import; errors are told by the parent
    parent = Connection(int(sys.argv[1]))
    os.set_inheritable(parent.fileno(), False)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        config, name, path = parent.recv()
        sys.path[:] = path
        from nemo_bluelm.rl.environments.compose import Composition

        try:
            for module in config.imports:
                import_module(module)
            rewards = Composition(config, name)
            while True:
                rewards.open()
                parent.send(None)  # ready
                parent.send(rewards.reward(parent.recv()))
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:
            parent.send(f"{type(error).__name__}: {error}"[:500])


if __name__ == "__main__":
    main()
