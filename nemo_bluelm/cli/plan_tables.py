"""The tables of ``nemo-bluelm plan`` about FLOPs, memory and time."""

from typing import Any

from rich.console import Console
from rich.table import Table

_GIB = 2**30
_CAUSES = ("compute", "bubble", "tensor", "context", "pipeline", "tiles", "data", "optimizer")


def show_flops(console: Console, flops: dict[str, Any]) -> None:
    table = _table("Model FLOPs, full packs", "", "")
    for text, value in (
        ("a token of text", flops["per_text_token"]),
        (f"a token, {flops['tiles_per_pack']} tiles a pack", flops["per_token"]),
        ("a step", flops["per_step"]),
        ("the run", flops["run"]),
    ):
        table.add_row(text, _si(value))
    console.print(table)


def show_device(console: Console, summary: dict[str, Any]) -> None:
    """The recipe's own layout, then what was asked for or is missing."""
    _show_layout(console, f"{summary['gpus']} x {summary['device']}", summary)
    if not summary["fits"]:
        need = f"This layout needs {summary['needed_gib']:.1f} GiB, a GPU has {summary['device_gib']:.1f}."
        if summary["nearest"]:
            print(f"{need} The nearest that fits: {' '.join(summary['nearest'])}")
        elif summary["nearest_gpus"]:
            print(f"{need} No layout fits; {summary['nearest_gpus']} GPUs are enough.")
        else:
            print(f"{need} No layout fits.")
    if "proposal" in summary:
        proposal = summary["proposal"]
        _show_layout(console, "Proposed layout", proposal)
        print(f"Proposed: {' '.join(proposal['overrides']) or 'the recipe as it is'}")
        _show_scaling(console, summary["scaling"])


def _show_layout(console: Console, title: str, layout: dict[str, Any]) -> None:
    stages = layout["memory"]
    table = _table(f"{title}: GiB on a GPU", "", *(["GPU"] if len(stages) == 1 else range(len(stages))))
    for part in stages[0]:
        if part == "total":
            table.add_section()
        name = {"total": "allocated at the peak", "needed": "needed in all"}.get(part, part)
        table.add_row(name, *(f"{stage[part] / _GIB:.1f}" for stage in stages))
    console.print(table)
    step = layout["step"]
    table = _table(f"{title}: a step", "", "seconds", "GB sent")
    for cause in _CAUSES:
        sent = step["sent"].get(cause, 0)
        if step[cause] or sent:
            table.add_row(cause, f"{step[cause]:.3f}", f"{sent / 1e9:.2f}" if sent else "")
    table.add_section()
    table.add_row("in all", f"{step['seconds']:.3f}", "")
    console.print(table)
    print(
        f"{step['tokens_per_second']:,.0f} tokens/s, {step['tflops']:.0f} TFLOP/s a GPU, {step['mfu']:.1%} MFU, "
        f"{layout['gpu_hours']:,.0f} GPU-hours"
    )


def _show_scaling(console: Console, rows: list[dict[str, Any]]) -> None:
    table = _table("Scaling", "GPUs", *("packs", "tokens/s", "MFU", "GiB") * 2)
    for row in rows:
        cells = []
        for layout in (row["same_batch"], row["grown_batch"]):
            if layout is None:
                cells += ["-"] * 4
                continue
            step = layout["step"]
            cells += [f"{layout['global_batch_size']:,}", f"{step['tokens_per_second'] / 1000:,.0f}k"]
            cells += [f"{step['mfu']:.1%}", f"{layout['needed_gib']:.1f}"]
        table.add_row(str(row["gpus"]), *cells)
    console.print(table)
    print("Left: the recipe's batch, doubled where it has too few packs. Right: a batch that grows with the GPUs.")


def _table(title: str, first: str, *columns: Any) -> Table:
    table = Table(title=title)
    table.add_column(str(first))
    for column in columns:
        table.add_column(str(column), justify="right")
    return table


def _si(value: float) -> str:
    """``value`` FLOP with a decimal prefix and three digits."""
    prefix = min(max(0, (len(f"{value:.0f}") - 1) // 3), 7)
    return f"{value / 1000**prefix:.3g} {' kMGTPEZ'[prefix].strip()}FLOP"
