"""``nemo-bluelm launch``: run a recipe, pipeline or ablation as jobs of a Slurm cluster, and look after them."""

import argparse
import json
import os
from pathlib import Path

from nemo_bluelm.errors import UserError

_ACTIONS = ("status", "logs", "cancel")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="recipe, pipeline or ablation; or status, logs, cancel, followed by the run_dir of a launch",
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="change a value, as train takes it")
    parser.add_argument("--cluster", metavar="NAME", help="cluster file, or the name of a packaged one")
    parser.add_argument(
        "--nodes", action="append", default=[], metavar="[STAGE=]N", help="nodes, instead of the cluster file's"
    )
    parser.add_argument("--time", metavar="LIMIT", help="time of a job, instead of the cluster file's (HH:MM:SS)")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="key=v1,v2",
        help="an array of runs, one for each value, or combination of values",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the scripts, hand nothing in")
    parser.add_argument("--json", action="store_true", help="for programs: ids, or status")
    parser.add_argument("-f", "--follow", action="store_true", help="logs: go on printing what is added")
    parser.add_argument("--run", metavar="NAME", help="logs: the stage (the one that was begun last)")
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="logs: rank (0)")
    parser.add_argument("--lines", type=int, default=40, metavar="N", help="logs: last lines (40)")


def run(args: argparse.Namespace) -> int:
    """Launch, or act on what was launched; the exit code.

    Raises:
        UserError: a mistake in recipe, cluster file or arguments; what Slurm refuses.
    """
    if args.recipe in _ACTIONS:
        if len(args.overrides) != 1:
            raise UserError(f"launch {args.recipe} takes the run_dir of a launch: nemo-bluelm launch {args.recipe} DIR")
        return {"status": _status, "logs": _logs, "cancel": _cancel}[args.recipe](
            args, Path(args.overrides[0]).absolute()
        )
    from dataclasses import replace

    from nemo_bluelm.launch.cluster import load_cluster, seconds
    from nemo_bluelm.launch.jobs import plan_jobs
    from nemo_bluelm.launch.launcher import launch, show

    if args.cluster is None:
        raise UserError("--cluster is missing: a file that says what your cluster is like; 'local' is one to copy")
    cluster = load_cluster(args.cluster)
    if args.time is not None:
        limit, most = seconds(args.time), seconds(cluster.max_time or "") or float("inf")
        if not limit or limit > most or limit <= cluster.warn_before:
            raise UserError(
                f"--time {args.time}: write minutes, HH:MM:SS or D-HH:MM:SS, more than warn_before "
                f"({cluster.warn_before} s)" + (f", at most max_time ({cluster.max_time})" if cluster.max_time else "")
            )
        cluster = replace(cluster, time=args.time)
    default, nodes = _nodes(args.nodes, cluster.nodes)
    plan = plan_jobs(args.recipe, args.overrides, args.sweep, nodes, default, cluster.tasks)
    if args.dry_run:
        show(plan, cluster)
        return 0
    submitted = launch(plan, cluster)
    if args.json:
        print(json.dumps({"run_dir": str(plan.root), "jobs": submitted}))
    elif submitted:
        print(f"nemo-bluelm launch status {plan.root}")
    return 0


def _nodes(given: list[str], default: int) -> tuple[int, dict[str, int]]:
    of_stage = {}
    for text in given:
        stage, _, number = text.rpartition("=")
        if not number.isdecimal() or int(number) < 1:
            raise UserError(f"--nodes {text}: it is a whole number of 1 or more, or STAGE=NUMBER")
        if stage:
            of_stage[stage] = int(number)
        else:
            default = int(number)
    return default, of_stage


def _status(args: argparse.Namespace, root: Path) -> int:
    from nemo_bluelm.launch.launcher import status

    rows = status(root)
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "job", "state", "step", "attempts", box=None)
    for row in rows:
        state = f"{row['state']} ({row['reason']})" if row["reason"] else row["state"]
        ended = f"{row['attempts']} ({', '.join(row['ended'])})" if row["ended"] else "0"
        table.add_row(row["run"], row["job"] or "-", state, str(row["step"]), ended)
    Console().print(table)
    return 0


def _logs(args: argparse.Namespace, root: Path) -> int:
    from nemo_bluelm.launch.launcher import logs

    file = logs(root, args.run, args.rank)
    os.execvp("tail", ["tail", "-n", str(args.lines), *(["-F"] if args.follow else []), str(file)])


def _cancel(args: argparse.Namespace, root: Path) -> int:
    from nemo_bluelm.launch.launcher import cancel

    ids = cancel(root)
    print(json.dumps(ids) if args.json else f"ended: {' '.join(ids)}" if ids else "no job of it was waiting or running")
    return 0
