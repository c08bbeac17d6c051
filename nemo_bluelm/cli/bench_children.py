"""Processes that measure: each a ``nemo-bluelm bench ... --worker FILE`` of its own."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from nemo_bluelm.children import python_environment
from nemo_bluelm.cli import worker
from nemo_bluelm.errors import UserError
from nemo_bluelm.runtime.parent import bound_to_this_process


def start(arguments: list[str], nproc: int = 1) -> int:
    """``nemo-bluelm ARGUMENTS`` in ``nproc`` processes that end with this one; the exit code.

    Raises:
        UserError: what the process says of a user's mistake.
        SystemExit: of several processes, whose launcher has said it.
    """
    if nproc > 1:
        from nemo_bluelm.cli.local_launch import launch

        code = launch(arguments, nproc)
        if code == UserError.EXIT_CODE:
            raise SystemExit(code)
        return code
    with tempfile.TemporaryDirectory(prefix="nemo-bluelm-") as reports:
        marks = {**bound_to_this_process(), **python_environment(), worker.REPORTS: reports}
        command = [sys.executable, "-m", "nemo_bluelm.cli.main", *arguments]
        code = subprocess.run(command, env={**os.environ, **marks}).returncode
        said = [file.read_text() for file in Path(reports).iterdir()]
    if said:
        raise UserError(said[0])
    return code
