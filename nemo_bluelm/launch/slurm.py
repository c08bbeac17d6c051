"""Slurm's commands, whose own words are shown where they refuse."""

import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from nemo_bluelm.errors import UserError

_TIMEOUT = 120  # seconds; a busy controller may take one
ACTIVE = (
    "PENDING",
    "RUNNING",
    "CONFIGURING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
    "STAGE_OUT",
    "SIGNALING",
    "STOPPED",
    "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
    "REQUEUE_FED",
)
_GONE = "Invalid job id"  # of a job that the controller has forgotten; any other failure says nothing about the job


@dataclass(frozen=True)
class State:
    """Of a job: Slurm's word, and why it is waiting or what became of it."""

    word: str
    reason: str = ""

    @property
    def active(self) -> bool:
        return self.word in ACTIVE


UNKNOWN = State("UNKNOWN", "left the controller's memory, and there is no accounting")


def submit(script: Path, after: Sequence[str] = (), kind: str = "afterok") -> str:
    """Hand a script in; returns the job's id.

    Args:
        after: ids of jobs that must have ended first, well (``afterok``) or anyhow (``afterany``).

    Raises:
        UserError: what Slurm says against it, with the script that has the flags.
    """
    dependency = [f"--dependency={kind}:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    return _call(["sbatch", "--parsable", *dependency, str(script)]).split(";")[0].strip()


def cancel(ids: Sequence[str]) -> None:
    """End jobs, waiting ones first, so that none starts because another ends; those that have ended are left.

    Raises:
        UserError: Slurm doesn't do it.
    """
    if ids:
        _call(["scancel", *ids], fine=_GONE)


def state(job: str) -> State:
    """The state of a job, or of an array the most active of its tasks'; from the queue, or what is remembered.

    Raises:
        UserError: the controller doesn't say.
    """
    lines = _call(["squeue", "--noheader", "--array", "--jobs", job, "--format=%T|%R"], fine=_GONE).splitlines()
    found = [State(word, why.strip("()")) for word, bar, why in (line.partition("|") for line in lines) if bar]
    if found:
        return min(found, key=lambda one: (one.word != "RUNNING", not one.active))
    told = _call(["scontrol", "show", "job", "--oneliner", job], fine=_GONE)
    words = re.findall(r"\bJobState=(\S+) Reason=(\S+)", told)
    if words:
        worst = next((pair for pair in words if pair[0] != "COMPLETED"), words[0])
        return State(worst[0], "" if worst[1] == "None" else worst[1])
    told = _call(["sacct", "-X", "-n", "-P", "-j", job, "-o", "state"], fine="").split("\n")[0]
    return State(told.split()[0]) if told.strip() else UNKNOWN


def account_problem(partition: Optional[str], account: Optional[str]) -> Optional[str]:
    """What the controller would say against a partition that isn't there, with the ones that are."""
    names = [line.rstrip("*") for line in _call(["sinfo", "--noheader", "--format=%P"]).split()]
    if partition is not None and any(part not in names for part in partition.split(",")):
        return f"partition {partition} is not there; this cluster has {', '.join(sorted(set(names)))}"
    return None


def _call(command: list[str], fine: Optional[str] = None) -> str:
    """What a command prints; nothing where it fails with words that have ``fine`` in them, or isn't there and may say
    anything."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    except FileNotFoundError:
        if fine == "":
            return ""
        raise UserError(
            f"{command[0]} is not here: call launch where jobs are submitted from, or with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} has not answered for {_TIMEOUT} s; is the controller up? (sinfo)") from None
    if not done.returncode:
        return done.stdout
    said = " ".join((done.stderr.strip() or done.stdout.strip()).split()).replace("sbatch: error: ", "")
    if fine is None or fine not in said:
        raise UserError(f"Slurm refuses '{shlex.join(command)}': {said}")
    return done.stdout
