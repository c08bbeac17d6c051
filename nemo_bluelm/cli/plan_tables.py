"""The tables of ``nemo-bluelm plan`` about FLOPs, memory and time."""

from typing import Any

from rich.console import Console
from rich.table import Table

_GIB = 2**30
_TEXT = "text alone"
_CAUSES = ("compute", "bubble", "tensor", "context", "pipeline", "tiles", "teacher", "data", "optimizer")


def show_flops(console: Console, flops: dict[str, Any]) -> None:
    text = flops["text"]
    tiles = f"at {flops['tiles_per_pack']} tiles a pack"
    table = _table("Model FLOPs, full packs", "", tiles, *([_TEXT] if text else []))
    for name, key in (("a token", "per_token"), ("a step", "per_step"), ("the run", "run")):
        table.add_row(name, *(_si(found[key]) for found in (flops, text) if found))
    if not text:
        table.add_row("a token of text", _si(flops["per_text_token"]))
    console.print(table)


def show_device(console: Console, summary: dict[str, Any]) -> None:
    """The recipe's own layout, then what was asked for or is missing."""
    if summary["problem"]:
        print(f"Note: {summary['problem']}")
    else:
        _show_own(console, summary)
    if "proposal" in summary:
        proposal = summary["proposal"]
        _show_layout(console, "Proposed layout", proposal)
        print(f"Proposed: {' '.join(proposal['overrides']) or 'the recipe as it is'}")
        _show_batch(summary, proposal)
        _show_scaling(console, summary["scaling"])


def _show_own(console: Console, summary: dict[str, Any]) -> None:
    _show_layout(console, f"{summary['gpus']} x {summary['device']}", summary)
    if not summary["fits"]:
        need = f"This layout needs {summary['needed_gib']:.1f} GiB, a GPU has {summary['device_gib']:.1f}."
        if summary["nearest"]:
            print(f"{need} The nearest that fits: {' '.join(summary['nearest'])}")
        elif summary["nearest_gpus"]:
            print(f"{need} No layout fits; {summary['nearest_gpus']} GPUs are enough.")
        else:
            print(f"{need} No layout fits.")


def _show_layout(console: Console, title: str, layout: dict[str, Any]) -> None:
    stages = layout["memory"]
    in_packs = f"at {layout['tiles_per_pack']} tiles a pack"
    table = _table(f"{title}: GiB on a GPU {in_packs}", "", *(["GPU"] if len(stages) == 1 else range(len(stages))))
    for part in stages[0]:
        if part == "total":
            table.add_section()
        name = {"total": "allocated at the peak", "needed": "needed in all"}.get(part, part)
        table.add_row(name, *(f"{stage[part] / _GIB:.1f}" for stage in stages))
    console.print(table)
    times = {in_packs: layout} | ({_TEXT: layout["text"]} if layout["text"] else {})
    columns = (column for name in times for column in (name.removesuffix(" a pack"), "GB sent"))
    table = _table(f"{title}: seconds of a step", "", *columns)
    for cause in _CAUSES:
        cells = []
        for step in (found["step"] for found in times.values()):
            sent = step["sent"].get(cause, 0)
            cells += [f"{step[cause]:.3f}" if step[cause] or sent else "", f"{sent / 1e9:.2f}" if sent else ""]
        if any(cells):
            table.add_row(cause, *cells)
    table.add_section()
    table.add_row("in all", *(cell for found in times.values() for cell in (f"{found['step']['seconds']:.3f}", "")))
    console.print(table)
    for name, found in times.items():
        print(f"{name.capitalize()}: {_rates(found)}")


def _rates(found: dict[str, Any]) -> str:
    step = found["step"]
    return (
        f"{step['tokens_per_second']:,.0f} tokens/s, {step['tflops']:.0f} TFLOP/s a GPU, {step['mfu']:.1%} MFU, "
        f"{found['gpu_hours']:,.0f} GPU-hours"
    )


def _show_batch(summary: dict[str, Any], proposal: dict[str, Any]) -> None:
    """What the recipe's own batch would do, where the proposal has a larger one."""
    smaller, packs = summary["own_batch"], proposal["global_batch_size"]
    override = f"train.global_batch_size={packs}"
    if override not in proposal["overrides"]:
        return
    if smaller is None:
        print(f"It has {packs} packs in a step: with the recipe's number no layout fits.")
        return
    in_packs = f"at {smaller['tiles_per_pack']} tiles a pack"
    print(
        f"It has {packs} packs in a step. With the recipe's {smaller['global_batch_size']}, {in_packs}: "
        f"{_rates(smaller)}; {' '.join(smaller['overrides']) or 'the recipe as it is'}"
    )


def _show_scaling(console: Console, rows: list[dict[str, Any]]) -> None:
    layouts = [row[kind] for row in rows for kind in ("same_batch", "grown_batch") if row[kind]]
    tiles, with_text = layouts[0]["tiles_per_pack"], layouts[0]["text"] is not None
    columns = ["packs", "tokens/s", "MFU"] + (["text"] if with_text else [])
    table = _table(f"Scaling at {tiles} tiles a pack, at best", "GPUs", *columns * 2)
    for row in rows:
        cells = []
        for layout in (row["same_batch"], row["grown_batch"]):
            if layout is None:
                cells += ["-"] * len(columns)
                continue
            step = layout["step"]
            cells += [f"{layout['global_batch_size']:,}", f"{step['tokens_per_second'] / 1000:,.0f}k"]
            cells += [f"{step['mfu']:.1%}"] + ([f"{layout['text']['step']['mfu']:.1%}"] if with_text else [])
        table.add_row(str(row["gpus"]), *cells)
    console.print(table)
    print(
        "Left: the recipe's batch, doubled until MFU is within a tenth of what 8 packs a GPU reach. Right: a batch\n"
        "that grows with the GPUs."
        + (" Text: MFU of text alone." if with_text else "")
        + "\nAn upper bound: bandwidths are data sheets', stragglers and congestion are left out, and more than one\n"
        "GPU was not measured."
    )


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
