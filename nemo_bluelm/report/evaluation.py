"""What an evaluation leaves: a table on the console and as Markdown and JSON, and a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from nemo_bluelm.atomic import write_atomically
from nemo_bluelm.errors import UserError
from nemo_bluelm.evaluate.budgets import Row
from nemo_bluelm.evaluate.run import Outcome

TABLE, TABLE_JSON, PLOT = "table.md", "table.json", "plot.png"
_COLUMNS = ("task", "mode", "accuracy", "95 % interval", "thought", "longest", "answer", "finished", "n", "unscored")
_TEXTS = 2  # columns of text; the others are numbers


def write_report(outcomes: Sequence[Outcome], out: Path) -> dict[str, Any]:
    """Write ``table.md``, ``table.json`` and ``plot.png``.

    Returns:
        What table.json has.

    Raises:
        UserError: the folder can't be written.
    """
    from nemo_bluelm.report.evaluation_plot import plot

    content = {"tasks": {outcome.task: _as_json(outcome) for outcome in outcomes}}
    lines = [_COLUMNS, ["---"] * _TEXTS + ["---:"] * (len(_COLUMNS) - _TEXTS), *_cells(outcomes)]
    try:
        write_atomically(out / TABLE_JSON, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
        write_atomically(out / TABLE, "".join(f"| {' | '.join(line)} |\n" for line in lines).encode())
        write_atomically(out / PLOT, plot({outcome.task: outcome.rows for outcome in outcomes}))
    except OSError as error:
        raise UserError(f"--out {out} can't be written: {error.strerror}; choose another folder") from error
    return content


def console_table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for number, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if number < _TEXTS else "right")
    for line in _cells(outcomes):
        table.add_row(*line)
    return table


def notes(outcome: Outcome) -> list[str]:
    """Lines about what is not in the accuracy."""
    lines = [f"{outcome.task}: {count} replies not scored: {reason}" for reason, count in outcome.reasons.items()]
    if outcome.skipped:
        first = outcome.skipped[0]
        lines.append(f"{outcome.task}: {len(outcome.skipped)} records skipped; {first.where}: {first.reason}")
    return lines


def _as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "rows": [asdict(row) for row in outcome.rows],
        "skipped": [asdict(skipped) for skipped in outcome.skipped],
        "unscored": outcome.reasons,
    }


def _cells(outcomes: Sequence[Outcome]) -> list[list[str]]:
    return [[outcome.task, row.mode.label, *_numbers(row)] for outcome in outcomes for row in outcome.rows]


def _numbers(row: Row) -> list[str]:
    nothing = row.accuracy is None
    return [
        "-" if nothing else f"{row.accuracy:.1%}",
        "-" if nothing else f"{row.low:.1%} to {row.high:.1%}",
        f"{row.thinking_tokens:,.1f}",
        f"{row.most_thinking_tokens:,}",
        f"{row.answer_tokens:,.1f}",
        f"{row.finished:.0%}",
        f"{row.problems:,}",
        f"{row.unscored:,}",
    ]
