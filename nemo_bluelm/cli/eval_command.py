"""``nemo-bluelm eval``: ask a checkpoint a task's problems, in both modes and with thinking budgets."""

import argparse
import json
import sys
from pathlib import Path

from nemo_bluelm.cli.arguments import add_json_argument, positive
from nemo_bluelm.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="a run folder (its newest checkpoint) or a checkpoint folder"
    )
    parser.add_argument(
        "overrides",
        metavar="[TASK.]key=value",
        nargs="*",
        help="change a value of the tasks (max_new_tokens=512, sampling.temperature=0.6, scorers.judge.model=NAME)",
    )
    parser.add_argument(
        "--task", action="append", metavar="NAME|FILE", help="a packaged task, or a task file; again for further ones"
    )
    parser.add_argument(
        "--data", action="append", metavar="PATH", help="JSONL or WebDataset tars of the task, in the order of --task"
    )
    parser.add_argument("--think", action="store_true", help="ask with thinking")
    parser.add_argument("--no-think", action="store_true", help="ask without thinking")
    parser.add_argument(
        "--budgets", type=_budgets, default=(), metavar="N,N,none", help="ask with thoughts of so many tokens at most"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N problems of each task")
    parser.add_argument("--tokens-at-once", type=positive, metavar="N", help="tokens of a batch (131072)")
    parser.add_argument("--out", type=Path, default=Path("outputs/eval"), metavar="DIR", help="folder (outputs/eval)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, write results, table and plot.

    Raises:
        UserError: a mistake in tasks, data or options, before the model is loaded; results of other settings.
    """
    from nemo_bluelm.evaluate.modes import TOKENS_AT_ONCE, think_modes
    from nemo_bluelm.evaluate.run import run_task
    from nemo_bluelm.evaluate.samples import find_data
    from nemo_bluelm.evaluate.tasks import open_marker
    from nemo_bluelm.report.evaluation import console_table, notes, write_report
    from nemo_bluelm.runtime.run_dir import resolve_checkpoint

    tasks = _tasks(args.task or [], args.overrides)
    data = [find_data([pattern]) for pattern in _data(args.data or [], list(tasks))]
    checkpoint = resolve_checkpoint(args.checkpoint, "CKPT")
    plans = []
    for task, files in zip(tasks.values(), data):
        asked = args.think or args.no_think or args.budgets
        think, direct = (args.think, args.no_think) if asked else (task.mode != "direct", task.mode != "think")
        modes = think_modes(think, direct, args.budgets)
        with open_marker(task):  # options and packages of its scorers
            for mode in modes:
                mode.sampling(task.settings())
        plans.append((task, files, modes))

    from nemo_bluelm.generate.generator import open_generator

    outcomes, at_once = [], args.tokens_at_once or TOKENS_AT_ONCE
    with open_generator(checkpoint) as generator:
        for task, files, modes in plans:
            outcomes.append(run_task(generator, task, files, modes, args.out, checkpoint, args.limit, at_once, _tell))
    content = write_report(outcomes, args.out)
    if args.json:
        print(json.dumps(content, ensure_ascii=False))
        return 0

    from rich.console import Console

    # rich would take COLUMNS for the width of a file or pipe.
    console = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    console.print(console_table(outcomes))
    for line in (note for outcome in outcomes for note in notes(outcome)):
        console.print(line)
    console.print(f"written to {args.out}")
    return 0


def _tasks(names: list[str], overrides: list[str]) -> dict:
    """Tasks by their names; an override that begins with one of these is for that task alone."""
    from nemo_bluelm.evaluate.tasks import load_task, packaged_tasks

    if not names:
        raise UserError(f"which task? --task NAME or --task FILE; packaged tasks: {', '.join(packaged_tasks())}")
    stems = [Path(name).stem for name in names]
    tasks = {}
    for name, stem in zip(names, stems):
        others = [other for other in stems if other != stem]
        own = [
            override.removeprefix(f"{stem}.")
            for override in overrides
            if not any(override.startswith(f"{other}.") for other in others)
        ]
        task = load_task(name, own)
        if task.name in tasks:
            raise UserError(f"--task {name}: there is already a task {task.name}; its results would mix, rename one")
        tasks[task.name] = task
    return tasks


def _data(patterns: list[str], tasks: list[str]) -> list[str]:
    if len(patterns) != len(tasks):
        lacks = f"; {tasks[len(patterns)]} has none" if len(patterns) < len(tasks) else ""
        raise UserError(f"there are {len(tasks)} --task and {len(patterns)} --data; give one for each{lacks}")
    return patterns


def _budgets(text: str) -> tuple[int | None, ...]:
    """argparse type: whole numbers of 0 or more and ``none``, separated by commas."""
    words = [word.strip().lower() for word in text.split(",")]
    if not all(word == "none" or word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of budgets such as 0,16,64,none")
    return tuple(None if word == "none" else int(word) for word in words)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
