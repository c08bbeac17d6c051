"""Hands jobs in, says how they are, shows their logs, ends them."""

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_bluelm.atomic import write_atomically
from nemo_bluelm.errors import UserError
from nemo_bluelm.launch import slurm
from nemo_bluelm.launch.cluster import ClusterConfig, Resume, check_mounted, missing_secrets, seconds
from nemo_bluelm.launch.jobs import LAUNCH_DIR, Job, Plan
from nemo_bluelm.launch.script import LOGS, SCRIPT, SECRETS, TASK, script_of, secrets_file, task_of
from nemo_bluelm.locks import hold_lock
from nemo_bluelm.runtime.run_dir import newest, step_of

STATE_FILE = "jobs.json"  # in LAUNCH_DIR
CANCEL_FILE = "cancel"


def show(plan: Plan, cluster: ClusterConfig) -> None:
    """Print what :func:`launch` would write and hand in."""
    for job in plan.jobs:
        print(f"# ---- {job.control / SCRIPT}")
        print(script_of(job, plan, cluster, Path.cwd()))
        for number, unit in enumerate(job.units):
            print(f"# ---- {job.control_of(number) / TASK}")
            print(task_of(unit, cluster))
        after = f" after {', '.join(job.after)}" if job.after else ""
        times = f", {cluster.chain_length} times in a row" if cluster.resume is Resume.chain else ""
        print(f"# ---- {'complete already' if job.done else f'sbatch {job.control / SCRIPT}{after}{times}'}\n")
    wanted = [job for job in plan.jobs if not job.done]
    hours = sum(job.nodes * len(job.units) for job in wanted) * (seconds(cluster.time) or 0) / 3600
    print(f"# {len(wanted)} jobs, at most {hours:,.1f} node hours before one is resumed")
    if missing := missing_secrets(cluster):
        print(f"# not set in this environment: {', '.join(missing)}")


def launch(plan: Plan, cluster: ClusterConfig) -> dict[str, list[str]]:
    """Hand in the jobs that aren't complete or under way; if one is refused, those handed in before are taken back.

    Returns:
        Ids by job; several where they are a chain.

    Raises:
        UserError: what is missing, or what Slurm says against a job.
    """
    check_mounted(cluster, plan.root)
    if missing := missing_secrets(cluster):
        raise UserError(f"secrets of the cluster file aren't set in this environment: {', '.join(missing)}")
    if problem := slurm.account_problem(cluster.partition, cluster.account):
        raise UserError(problem)
    with _locked(plan.root):
        known, words = _read_state(plan.root)
        submitted: dict[str, list[str]] = {}
        new: list[str] = []
        try:
            if cluster.secrets:
                _write_secrets(plan, cluster)
            for job in plan.jobs:
                if job.done:
                    print(f"{job.name}: complete", file=sys.stderr)
                    continue
                ids = known.get(job.name, [])
                found, wanted = _state(ids), _commands(job)
                if found.active and words.get(job.name, wanted) != wanted:
                    raise UserError(
                        f"{job.name}: job {ids[-1]} is {found.word} with other words; wait for it, end it by "
                        f"'nemo-bluelm launch cancel {plan.root}', or choose another run_dir"
                    )
                renewed = any(submitted[name][-1] in new for name in job.after if name in submitted)
                if found.word == "PENDING" and renewed:
                    slurm.cancel(list(reversed(ids)))  # it waits for a job that is gone
                elif found.active:
                    print(f"{job.name}: job {ids[-1]} is {found.word} already", file=sys.stderr)
                    submitted[job.name] = ids
                    continue
                _write_files(job, plan, cluster)
                after = [submitted[name][-1] for name in job.after if name in submitted]
                ids = [slurm.submit(job.control / SCRIPT, after)]
                new.append(ids[0])
                for _ in range(cluster.chain_length - 1 if cluster.resume is Resume.chain else 0):
                    ids.append(slurm.submit(job.control / SCRIPT, ids[-1:], "afterany"))
                    new.append(ids[-1])
                submitted[job.name] = ids
                behind = f" after {', '.join(after)}" if after else ""
                print(f"{job.name}: job {' '.join(ids)}{behind}", file=sys.stderr)
        except BaseException:
            slurm.cancel(list(reversed(new)))
            raise
        commands = {job.name: _commands(job) for job in plan.jobs}
        content = {"name": plan.name, "jobs": known | submitted, "commands": commands, "runs": _runs(plan)}
        write_atomically(_state_file(plan.root), (json.dumps(content, indent=1) + "\n").encode())
    return submitted


def status(root: Path) -> list[dict[str, Any]]:
    """How the jobs of a launch are: a row for each run, with job, state, reason, step and attempts.

    Raises:
        UserError: nothing was launched in that folder.
    """
    rows = []
    content = _read(root)
    for run in content["runs"]:
        ids = content["jobs"].get(run["job"], [])
        state = _state([f"{one}_{run['task']}" for one in ids] if "task" in run else ids)
        folder, attempts = Path(run["folder"]), _attempts(Path(run["control"]))
        under_way = state.active and attempts and len(attempts[-1]) < 5
        if Path(run["marker"]).exists() and not under_way:
            state = slurm.State("COMPLETE")
        checkpoint = newest(folder)
        rows.append(
            {
                "run": run["name"],
                "job": ids[-1] if ids else None,
                "state": state.word,
                "reason": state.reason,
                "step": step_of(checkpoint) if checkpoint else 0,
                "attempts": len(attempts),
                "ended": [attempt[4] if len(attempt) > 4 else "running" for attempt in attempts],
            }
        )
    return rows


def logs(root: Path, name: str | None, rank: int) -> Path:
    """The log of a rank in the newest attempt of a run; where no attempt has begun, the job's own.

    Args:
        name: of the run; None for the one that was begun last.

    Raises:
        UserError: there is none.
    """
    runs = {run["name"]: Path(run["control"]) for run in _read(root)["runs"]}
    if name is not None and name not in runs:
        raise UserError(f"--run {name}: there is no such run; there are {', '.join(runs)}")
    found = []
    for control in [runs[name]] if name else runs.values():
        found += [folder / f"rank_{rank}.log" for folder in (control / LOGS).glob("attempt_*")]
        found += control.glob("slurm_*.log")
    ranks = [file for file in found if file.name == f"rank_{rank}.log" and file.exists()]
    files = ranks or [file for file in found if file.exists()]
    if not files:
        raise UserError(f"{root}: no job of it has begun; 'nemo-bluelm launch status {root}' says what it waits for")
    return max(files, key=lambda file: file.stat().st_mtime)


def cancel(root: Path) -> list[str]:
    """End all jobs of a launch for good; returns their ids."""
    with _locked(root):
        content = _read(root)
        for run in content["runs"]:
            Path(run["control"]).mkdir(parents=True, exist_ok=True)
            (Path(run["control"]) / CANCEL_FILE).touch()  # a requeue that is under way ends at once
        (root / LAUNCH_DIR / SECRETS).unlink(missing_ok=True)
        ids = [job for several in content["jobs"].values() for job in several]
        active = [job for job in ids if slurm.state(job).active]
        slurm.cancel(list(reversed(ids)))  # all: one may have become active meanwhile
    return active


def _write_files(job: Job, plan: Plan, cluster: ClusterConfig) -> None:
    for number, unit in enumerate(job.units):
        control = job.control_of(number)
        (control / LOGS).mkdir(parents=True, exist_ok=True)
        (control / CANCEL_FILE).unlink(missing_ok=True)
        if not unit.done and unit.marker.is_file():
            unit.marker.unlink()  # of fewer steps than are wanted now
        write_atomically(control / TASK, task_of(unit, cluster).encode())
        _close_book(control)
    write_atomically(job.control / SCRIPT, script_of(job, plan, cluster, Path.cwd()).encode())


def _close_book(control: Path) -> None:
    """A launch by hand starts the counts of crashes and stalls and the list of nodes that weren't well anew; the
    attempts before are kept beside."""
    attempts = control / "attempts.tsv"
    if attempts.exists():
        with (control / "attempts_before.tsv").open("a") as before:
            before.write(attempts.read_text())
        attempts.unlink()
    (control / "excluded").unlink(missing_ok=True)


def _attempts(control: Path) -> list[list[str]]:
    lines = []
    for name in ("attempts_before.tsv", "attempts.tsv"):
        if (control / name).exists():
            lines += (control / name).read_text().splitlines()
    return [line.split("\t") for line in lines]


def _commands(job: Job) -> list[list[str]]:
    return [list(unit.command) for unit in job.units]


def _state(ids: list[str]) -> slurm.State:
    """Of a job, or of a chain of them: the first that is not over, or else the last."""
    states = [slurm.state(job) for job in ids]
    return next((state for state in states if state.active), states[-1] if states else slurm.State("-"))


def _runs(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "name": job.name if len(job.units) == 1 else unit.folder.name,
            "job": job.name,
            "control": str(job.control_of(number)),
            "folder": str(unit.folder),
            "marker": str(unit.marker),
            **({"task": number} if len(job.units) > 1 else {}),
        }
        for job in plan.jobs
        for number, unit in enumerate(job.units)
    ]


def _write_secrets(plan: Plan, cluster: ClusterConfig) -> None:
    file = secrets_file(plan)
    text = "".join(f"{name}={shlex.quote(os.environ[name])}\n" for name in cluster.secrets)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        os.fchmod(descriptor, 0o600)
        stream.write(text)


def _state_file(root: Path) -> Path:
    return root / LAUNCH_DIR / STATE_FILE


def _read_state(root: Path) -> tuple[dict[str, list[str]], dict[str, list[list[str]]]]:
    """Ids and commands of each job that was handed in before."""
    content = _read(root) if _state_file(root).exists() else {"jobs": {}}
    return content["jobs"], content.get("commands", {})


def _read(root: Path) -> dict[str, Any]:
    file = _state_file(root)
    try:
        content = json.loads(file.read_text())
        content["jobs"], content["runs"]
        return content
    except FileNotFoundError:
        raise UserError(f"{root}: nothing was launched from there; name the run_dir of a launch") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} can't be read ({type(error).__name__}); launch again to write it anew") from error


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    folder = root / LAUNCH_DIR
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as file:
            hold_lock(file.fileno(), folder, wait=False)
            yield
    except BlockingIOError:
        raise UserError(f"{root} is being launched or cancelled by another command; wait for it") from None
    except PermissionError as error:
        raise UserError(f"{folder} can't be written: {error.strerror}; set run_dir to a writable folder") from error
