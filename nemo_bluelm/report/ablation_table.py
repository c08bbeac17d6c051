"""The table of an ablation: a column for each variant, a row for each number."""

from collections.abc import Sequence
from typing import Optional

from rich import box
from rich.table import Table

from nemo_bluelm.evaluate.measures import CHANGE, NATS, SHARE, TOKENS

Row = tuple[str, str, Sequence[Optional[float]]]  # name, unit, a value for each variant
_FORMATS = {SHARE: "{:.1%}", CHANGE: "{:+.1%}", NATS: "{:.3f}", TOKENS: "{:,.0f}"}
_NOTHING = "-"


def shown(value: Optional[float], unit: str) -> str:
    """A number as tables and plots show it."""
    return _NOTHING if value is None else _FORMATS[unit].format(value)


def markdown(labels: Sequence[str], rows: Sequence[Row]) -> str:
    lines = [["", *labels], ["---", *["---:"] * len(labels)], *_cells(rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def console_table(labels: Sequence[str], rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("")
    for label in labels:
        table.add_column(label, justify="right")
    for line in _cells(rows):
        table.add_row(*line)
    return table


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    names = [f"{name} (nats)" if unit == NATS else name for name, unit, _ in rows]
    return [[name, *(shown(value, unit) for value in values)] for name, (_, unit, values) in zip(names, rows)]
