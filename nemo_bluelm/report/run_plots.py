"""The charts of a run report: one figure each, as SVG that follows the page's colours, and as PNG."""

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from nemo_bluelm.report.plot_style import COLOURS, FAINT, INK, as_png, new_figure, plain, shares, verbatim
from nemo_bluelm.report.runs import Run

POINTS = 500  # of a curve; more steps are averaged
_DECADES = 30.0  # of the largest to the smallest value, from which on an axis is logarithmic
_WIDTH, _HEIGHT = 5.4, 2.9  # inches


@dataclass(frozen=True)
class Chart:
    """A drawn figure; ``name`` is its file's."""

    name: str
    title: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class _Curves:
    """A chart of metrics against steps.

    Attributes:
        metrics: label by metric; one metric alone is labelled by the run.
        unit: of the y axis.
    """

    name: str
    title: str
    metrics: dict[str, str]
    unit: str
    logarithmic: bool = False
    share: bool = False
    from_zero: bool = False
    scale: float = 1.0


_CURVES = (
    _Curves("loss", "Loss", {"loss": "loss"}, "of a token, mean"),
    _Curves(
        "losses", "Parts of the loss", {"cross_entropy": "cross-entropy", "divergence": "divergence"}, "nats a token"
    ),
    _Curves("accuracy", "Pairs told apart", {"accuracy": "accuracy"}, "", share=True),
    _Curves("reward", "Reward", {"reward/mean": "mean"}, "reward"),
    _Curves("lr", "Learning rate", {"lr": "lr"}, "", from_zero=True),
    _Curves("grad_norm", "Gradient norm", {"grad_norm": "norm"}, "before clipping", logarithmic=True, from_zero=True),
    _Curves("speed", "Speed", {"tokens_per_second": "tokens"}, "thousand real tokens a second", scale=1e-3),
    _Curves("mfu", "Model FLOPs utilisation", {"mfu": "MFU"}, "of the dense BF16 peak", share=True),
    _Curves("kl", "Distance from the reference", {"kl/ref": "KL"}, "nats a token"),
    _Curves("entropy", "Entropy of the policy", {"policy/entropy": "entropy"}, "nats a token"),
    _Curves(
        "mismatch", "Mismatch of rollout and training", {"mismatch/token_mult_prob_error": "exp |difference|"}, "factor"
    ),
)


def charts(runs: Sequence[Run]) -> list[Chart]:
    """All charts that the runs have numbers for; several runs share each."""
    found = [chart for curves in _CURVES if (chart := _of_curves(curves, runs)) is not None]
    if len(runs) == 1:
        drawers = (_loss_by_source, _rewards_by_task, _lengths, _validation, _mixture)
        found += filter(None, (draw(runs[0]) for draw in drawers))
    return found


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most ``POINTS`` points: means over as many equal stretches of steps."""
    if len(steps) <= POINTS:
        return list(steps), list(values)
    xs, ys = [], []
    for number in range(POINTS):
        first, end = number * len(steps) // POINTS, (number + 1) * len(steps) // POINTS
        xs.append(sum(steps[first:end]) / (end - first))
        ys.append(sum(values[first:end]) / (end - first))
    return xs, ys


def budget_chart(name: str, title: str, rows: Sequence[dict[str, Any]]) -> Optional[Chart]:
    """Accuracy against thinking tokens spent, of one evaluation."""
    known = sorted((row for row in rows if row.get("accuracy") is not None), key=lambda row: row["thinking_tokens"])
    if not known:
        return None

    def draw(axes: Any) -> None:
        for think, label, colour in ((False, "not thinking", COLOURS[1]), (True, "thinking", COLOURS[0])):
            some = [row for row in known if bool(row.get("think")) == think]
            if some:
                ys = [row["accuracy"] for row in some]
                low = [y - row.get("low", y) for row, y in zip(some, ys)]
                high = [row.get("high", y) - y for row, y in zip(some, ys)]
                xs = [row["thinking_tokens"] for row in some]
                axes.errorbar(xs, ys, yerr=[low, high], color=colour, marker="o", linewidth=1.4, label=label)
        shares(axes)
        axes.set_xlabel("thinking tokens of a reply, mean", fontsize=8, color=INK)

    return _drawn(name, title, draw)


def _of_curves(curves: _Curves, runs: Sequence[Run]) -> Optional[Chart]:
    lines = [
        (
            label if len(runs) == 1 else run.name,
            *run.values(metric),
            len(curves.metrics) > 1 and len(runs) > 1 and label,
        )
        for run in runs
        for metric, label in curves.metrics.items()
    ]
    lines = [(f"{name}, {extra}" if extra else name, xs, ys) for name, xs, ys, extra in lines if xs]
    if not lines:
        return None

    def draw(axes: Any) -> None:
        _draw_lines(axes, [(name, xs, [y * curves.scale for y in ys]) for name, xs, ys in lines])
        values = [y for _, _, ys in lines for y in ys if math.isfinite(y)]
        if curves.logarithmic and min(values, default=0) > 0 and max(values) > _DECADES * min(values):
            axes.set_yscale("log")
        elif curves.from_zero:
            axes.set_ylim(bottom=0)
        if curves.share:
            shares(axes)
        axes.set_ylabel(curves.unit, fontsize=8, color=INK)

    return _drawn(curves.name, curves.title, draw, legend=len(lines) > 1)


def _draw_lines(axes: Any, lines: Sequence[tuple[str, Sequence[int], Sequence[float]]]) -> None:
    for number, (name, xs, ys) in enumerate(lines):
        finite = [(x, y) for x, y in zip(xs, ys) if math.isfinite(y)]
        xs, ys = thinned([x for x, _ in finite], [y for _, y in finite])
        marker = {"marker": "o", "markersize": 3} if len(xs) == 1 else {}
        axes.plot(xs, ys, color=COLOURS[number % len(COLOURS)], linewidth=1.3, label=verbatim(name), **marker)
    axes.set_xlabel("step", fontsize=8, color=INK)


def _by_task(run: Run, pattern: str) -> Iterator[tuple[str, list[int], list[float]]]:
    names = sorted({key for row in run.steps for key in row if re.fullmatch(pattern, key)})
    for name in names:
        yield re.fullmatch(pattern, name)[1], *run.values(name)


def _loss_by_source(run: Run) -> Optional[Chart]:
    """Of a run of several sources; of one it is the loss."""
    named = [(row["step"], row.get("loss_by_source", {})) for row in run.steps]
    sources = sorted({name for _, losses in named for name in losses})
    lines = []
    for source in sources if len(sources) > 1 else ():
        known = [(step, losses[source]) for step, losses in named if source in losses]
        lines.append((source, [step for step, _ in known], [loss for _, loss in known]))
    return _lines_chart("loss_by_source", "Loss by source", "of a token, mean", lines)


def _rewards_by_task(run: Run) -> Optional[Chart]:
    lines = list(_by_task(run, r"reward/(.+)/mean"))
    return _lines_chart("reward_by_task", "Reward by task", "mean reward", lines)


def _lengths(run: Run) -> Optional[Chart]:
    lines = list(_by_task(run, r"(?:length|tokens|generation)/(.+?)(?:/mean)?"))
    return _lines_chart("lengths", "Tokens of replies", "tokens, mean", lines)


def _validation(run: Run) -> Optional[Chart]:
    names = sorted({key for row in run.validations for key in row if key.startswith("val/") and "rate" not in key})
    lines = []
    for name in names:
        rows = [row for row in run.validations if isinstance(row.get(name), (int, float))]
        lines.append((name.removeprefix("val/"), [row["step"] for row in rows], [row[name] for row in rows]))
    return _lines_chart("validation", "On held-out prompts", "", lines)


def _lines_chart(
    name: str, title: str, unit: str, lines: Sequence[tuple[str, list[int], list[float]]]
) -> Optional[Chart]:
    lines = [line for line in lines if line[1]]
    if not lines:
        return None

    def draw(axes: Any) -> None:
        _draw_lines(axes, lines)
        axes.set_ylabel(unit, fontsize=8, color=INK)

    return _drawn(name, title, draw, legend=True)


def _mixture(run: Run) -> Optional[Chart]:
    rows = [row for row in run.steps if sum(row.get("tokens_by_source", {}).values())]
    if not rows:
        return None
    sources = sorted({name for row in rows for name in row["tokens_by_source"]})
    totals = [sum(row["tokens_by_source"].values()) for row in rows]
    steps = [row["step"] for row in rows]

    def draw(axes: Any) -> None:
        parts = [[row["tokens_by_source"].get(name, 0) / total for row, total in zip(rows, totals)] for name in sources]
        _draw_lines(axes, [(name, steps, part) for name, part in zip(sources, parts)])
        for number, (_, share) in enumerate(planned_shares(run, sources)):
            if share is not None:
                axes.axhline(share, color=COLOURS[number % len(COLOURS)], linewidth=0.9, linestyle=":")
        shares(axes)
        axes.set_ylabel("of all tokens so far; dotted: planned", fontsize=8, color=INK)

    return _drawn("mixture", "Tokens by source", draw, legend=True)


def planned_shares(run: Run, sources: Sequence[str]) -> list[tuple[str, Optional[float]]]:
    """The share of each source that the recipe's weights ask for; None where it doesn't say."""
    given = run.key("data.sources") or {}
    weights = {name: entry.get("weight") for name, entry in given.items() if isinstance(entry, dict)}
    total = sum(weight for weight in weights.values() if isinstance(weight, (int, float)))
    return [(name, weights[name] / total if total and weights.get(name) is not None else None) for name in sources]


def _drawn(name: str, title: str, draw: Callable[[Any], None], legend: bool = True) -> Chart:
    figure = new_figure(_WIDTH, _HEIGHT)
    axes = figure.add_subplot()
    axes.ticklabel_format(useOffset=False)
    draw(axes)
    plain(axes, title)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    if legend and axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return Chart(name, title, _as_svg(figure, name, title), as_png(figure))


def _as_svg(figure: Any, name: str, title: str) -> str:
    """The figure as an element of a page, in whose colours it is drawn."""
    import matplotlib

    file = io.StringIO()
    warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has one
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)  # unique on a page of several charts
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    svg = f'<svg {box} role="img" aria-label="{html.escape(title)}">{svg[svg.index(">") + 1 :]}'
    svg = svg.replace("xlink:href", "href")
    return svg.replace(INK, "currentColor").replace(FAINT, "var(--rule)")
