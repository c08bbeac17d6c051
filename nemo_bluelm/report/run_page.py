"""The report of runs: one page that needs nothing else, and its charts as files."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nemo_bluelm.atomic import write_atomically
from nemo_bluelm.errors import UserError
from nemo_bluelm.report.run_plots import Chart, budget_chart, charts, planned_shares
from nemo_bluelm.report.runs import Found, Run

TEMPLATES = Path(__file__).parent / "templates"
_PER_RUN = ("name", "run_dir")  # keys that differ between any two runs
_EVENTS = 12  # shown of a run


@dataclass(frozen=True)
class Section:
    """A run, or several in the same charts."""

    title: str
    slug: str
    runs: list[dict[str, Any]]
    charts: list[Chart]
    mixture: list[dict[str, Any]]
    events: list[dict[str, Any]]
    replies: list[dict[str, Any]]


def summary(found: Found) -> dict[str, Any]:
    """The numbers of the page, for programs; the page has them, too."""
    return {
        "runs": [_row(run) for run in found.runs],
        "differences": differences(found.runs) if found.together else {},
        "evaluations": found.evaluations,
    }


def write_report(found: Found, out: Path, pngs: Optional[Path] = None) -> None:
    """Write the page, and the charts as PNG files ``SECTION_CHART.png``.

    Args:
        out: the HTML file.
        pngs: folder of the charts; None for none.

    Raises:
        UserError: a place can't be written.
    """
    groups = [found.runs] if found.together and found.runs else [[run] for run in found.runs]
    sections = [_section(number, runs) for number, runs in enumerate(groups)]
    budgets = [
        chart
        for number, (task, rows) in enumerate(found.evaluations.items())
        if (chart := budget_chart(f"budget{number}", f"{task}: accuracy by thinking tokens", rows)) is not None
    ]
    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    jinja.filters["number"] = number_text
    data = json.dumps(summary(found), ensure_ascii=False, allow_nan=False, default=str).replace("<", "\\u003c")
    html = jinja.get_template("run.html.j2").render(
        title=found.title,
        style=Markup((TEMPLATES / "run.css").read_text()),
        sections=sections,
        together=found.together,
        rows=[_row(run) for run in found.runs],
        differences=differences(found.runs) if found.together else {},
        budgets=budgets,
        evaluations=found.evaluations,
        data=Markup(data),
        svg=lambda chart: Markup(chart.svg),
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, html.encode())
        if pngs is not None:
            pngs.mkdir(parents=True, exist_ok=True)
            for section in sections:
                for chart in section.charts:
                    write_atomically(pngs / f"{section.slug}_{chart.name}.png", chart.png)
            for chart in budgets:
                write_atomically(pngs / f"{chart.name}.png", chart.png)
    except OSError as error:
        raise UserError(f"{error.filename or out} can't be written: {error.strerror}; choose another place") from error


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Values of the recipe's keys that aren't the same in all runs, by key."""
    flat = [dict(_flat(run.recipe)) for run in runs]
    keys = sorted(set().union(*flat)) if len(runs) > 1 else []
    found = {key: [of.get(key) for of in flat] for key in keys if key.split(".")[0] not in _PER_RUN}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def number_text(value: Any) -> str:
    """A number as people read it; texts stay."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"


def _section(number: int, runs: list[Run]) -> Section:
    name = runs[0].name if len(runs) == 1 else "runs"
    slug = re.sub(r"\W+", "_", f"{number + 1:02d}_{name}")
    drawn = [
        Chart(chart.name, chart.title, chart.svg.replace(f"{chart.name}-", f"s{number}{chart.name}-"), chart.png)
        for chart in charts(runs)
    ]
    events = [{"run": run.name, **event} for run in runs for event in run.events[-_EVENTS:]]
    return Section(
        title=name if len(runs) == 1 else "Curves",
        slug=slug,
        runs=[_row(run) for run in runs],
        charts=drawn,
        mixture=_mixture(runs[0]) if len(runs) == 1 else [],
        events=[event for event in events if event.get("event") != "start" or event.get("step")],
        replies=runs[0].replies if len(runs) == 1 else [],
    )


def _row(run: Run) -> dict[str, Any]:
    """What a table says of a run."""
    last = run.steps[-1]
    seconds = [row["seconds"] for row in run.steps if row.get("seconds")]
    tokens = [row["tokens"] for row in run.steps if row.get("tokens")]
    rest = sorted(seconds[1:] or seconds)
    environment = run.environment
    layout = {key: run.key(f"parallel.{key}") for key in ("tensor", "pipeline", "context")}
    split = " ".join(f"{key[0].upper()}P{size}" for key, size in layout.items() if size and size > 1)
    git = (environment.get("folder_git") or environment.get("package_git") or {}).get("commit")
    planned = run.key("train.steps")
    return {
        "name": run.name,
        "folder": str(run.folder),
        "step": last["step"],
        "steps": planned,
        "complete": planned is None or last["step"] >= planned,
        "loss": _end([loss for loss in run.values("loss")[1] if math.isfinite(loss)]),
        "tokens": sum(tokens),
        "seconds": sum(seconds),
        "median_step_seconds": rest[len(rest) // 2] if rest else None,
        "tokens_per_second": sum(tokens) / sum(seconds) if seconds and sum(seconds) else None,
        "mfu": last.get("mfu"),
        "bad_samples": last.get("bad_samples"),
        "device": environment.get("device"),
        "ranks": environment.get("world_size"),
        "layout": split or "one copy a rank",
        "starts": sum(event.get("event") == "start" for event in run.events),
        "left_out": sum(event.get("event") == "left_out" for event in run.events),
        "git": git[:10] if git else None,
        "packages": environment.get("packages") or {},
    }


def _end(values: Sequence[float]) -> Optional[float]:
    """The mean of the last tenth: of few samples, a step alone says little."""
    some = values[-max(1, len(values) // 10) :]
    return sum(some) / len(some) if some else None


def _mixture(run: Run) -> list[dict[str, Any]]:
    """Tokens of each source beside what was planned."""
    tokens = run.steps[-1].get("tokens_by_source") or {}
    total = sum(tokens.values())
    if not total:
        return []
    planned = dict(planned_shares(run, sorted(tokens)))
    return [
        {"source": name, "tokens": count, "share": count / total, "planned": planned[name]}
        for name, count in sorted(tokens.items(), key=lambda item: -item[1])
    ]


def _flat(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, dict):
        endless = isinstance(node, float) and not math.isfinite(node)  # JSON has no such number
        return [(prefix, str(node) if endless else node)]
    return [pair for key, value in node.items() for pair in _flat(value, f"{prefix}.{key}".lstrip("."))]
