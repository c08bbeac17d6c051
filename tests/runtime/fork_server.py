"""Runs commands in forks of a process that has imported what training needs: the imports take longer than a short run.

    python fork_server.py FOLDER

Each line of JSON on stdin, {"name": ..., "arguments": [...], "environment": {...}}, is a process of its own that runs
``nemo-bluelm ARGUMENTS``. In FOLDER it leaves NAME.out, all that it printed, and, once it has ended, NAME.code.
"""

import atexit
import json
import os
import signal
import sys
from pathlib import Path

from nemo_bluelm.runtime.environment import prepare

prepare()

from nemo_bluelm.cli.main import main  # noqa: E402
from nemo_bluelm.runtime import checkpoints, data, optimizer, plugin, storage, strategy  # noqa: E402, F401
from nemo_bluelm.train import interrupt, losses, metrics, run, schedules  # noqa: E402, F401


def serve(folder: Path) -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that watch are not waited for
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return watch(folder, **json.loads(line))
    return 0


def watch(folder: Path, name: str, arguments: list[str], environment: dict[str, str]) -> int:
    """Fork once more; the one half becomes the command, the other tells its exit code."""
    process = os.fork()
    if process == 0:
        os.setsid()
        output = os.open(folder / f"{name}.out", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= environment
        code = main(arguments)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # torch's destructors would join threads that a fork does not have
    (folder / f"{name}.pid").write_text(str(process))
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    (folder / f"{name}.part").write_text(str(code))
    (folder / f"{name}.part").rename(folder / f"{name}.code")
    os._exit(0)


if __name__ == "__main__":
    sys.exit(serve(Path(sys.argv[1])))
