"""What happened to a run besides its steps: starts, damaged checkpoints, skipped steps; a line of JSON each."""

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Optional

from nemo_bluelm.atomic import write_atomically
from nemo_bluelm.runtime.environment import Launch

EVENTS_FILE = "events.jsonl"
ENVIRONMENT_FILE = "environment.json"
_PACKAGES = (
    *("nemo-bluelm", "torch", "nemo-toolkit", "megatron-core", "transformer-engine", "apex", "transformers", "numpy"),
    *("nvidia-dali-cuda130", "nvidia-dali-cuda120", "webdataset", "nvidia-resiliency-ext"),
)


def note(run_dir: Path, event: str, step: int, detail: str = "") -> None:
    """Add a line: time (UTC, ISO 8601), ``event``, the step after which it happened, and a sentence. Raises OSError."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with (run_dir / EVENTS_FILE).open("a") as file:
        file.write(json.dumps({"time": now, "event": event, "step": step, "detail": detail}) + "\n")


def write_environment(run_dir: Path, launch: Launch) -> None:
    """Write down what a run runs on: packages, Git state, host, devices, job. Raises OSError."""
    import torch

    gpus = torch.cuda.device_count()
    content = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if gpus else platform.processor() or platform.machine(),
        "world_size": launch.world_size,
        "ranks_per_host": launch.local_world_size,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "package_git": _git_state(Path(__file__).parent),
        "folder_git": _git_state(Path.cwd()),
    }
    write_atomically(run_dir / ENVIRONMENT_FILE, (json.dumps(content, indent=1) + "\n").encode())


def _version(package: str) -> Optional[str]:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state(folder: Path) -> Optional[dict[str, Any]]:
    """Commit and changed files of the Git repository that a folder is in; None where it is in none."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "changed": _git(folder, "status", "--porcelain", "-uno").splitlines()}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()
