"""Whether a node is fit to begin: ``python -m nemo_bluelm.launch.health FOLDER --gpus N``. Standard library only."""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_LEAST_FREE = 2**30  # bytes of the run's disk
_SMI = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]


def problems(folder: Path, gpus: int) -> Iterator[str]:
    """What is wrong with this node.

    Args:
        folder: that runs write into.
        gpus: that a job was given.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
        if free < _LEAST_FREE:
            yield f"{folder} has {free / 2**30:.2f} GiB left, a run needs {_LEAST_FREE / 2**30:.0f}"
    except OSError as error:
        yield f"{folder} can't be written: {error.strerror}"
    if master := os.environ.get("MASTER_ADDR"):
        try:
            socket.getaddrinfo(master, None)
        except OSError as error:
            yield f"the first node's name {master} can't be resolved: {error}"
    if gpus:
        yield from _gpu_problems(gpus)


def _gpu_problems(gpus: int) -> Iterator[str]:
    try:
        found = subprocess.run(_SMI, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield f"nvidia-smi doesn't answer: {error}"
        return
    if found.returncode:
        yield f"nvidia-smi fails: {(found.stdout + found.stderr).strip()[:200]}"
        return
    rows = [line.split(", ") for line in found.stdout.splitlines() if line.strip()]
    if len(rows) < gpus:
        yield f"nvidia-smi sees {len(rows)} GPUs, the job asked for {gpus}"
    for index, errors in rows:
        if errors.isdecimal() and int(errors):
            yield f"GPU {index} has {errors} uncorrected memory errors since it was started"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gpus", type=int, default=0)
    args = parser.parse_args()
    found = list(problems(args.folder, args.gpus))
    for problem in found:
        print(f"{os.environ.get('SLURMD_NODENAME', socket.gethostname())}: {problem}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
