"""The plot of an evaluation: accuracy against the thinking tokens that were spent, a line for each task."""

from collections.abc import Mapping, Sequence

from nemo_bluelm.evaluate.budgets import Row
from nemo_bluelm.report.plot_style import COLOURS, FAINT, INK, MARKERS, as_png, new_figure, plain, shares, verbatim


def plot(rows: Mapping[str, Sequence[Row]]) -> bytes:
    """A PNG; hollow marks are without thinking, whiskers 95 % intervals.

    Args:
        rows: by the task's name.
    """
    figure = new_figure(5.6, 3.9)
    axes = figure.add_subplot()
    for number, (task, of) in enumerate(rows.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        known = [row for row in of if row.accuracy is not None]
        for think in (False, True):
            some = sorted((row for row in known if row.think == think), key=lambda row: row.thinking_tokens)
            if not some:
                continue
            ys = [row.accuracy for row in some]
            axes.errorbar(
                [row.thinking_tokens for row in some],
                ys,
                yerr=[[y - row.low for row, y in zip(some, ys)], [row.high - y for row, y in zip(some, ys)]],
                color=colour,
                marker=marker,
                markerfacecolor=colour if think else "white",
                markersize=5,
                linewidth=1.6,
                elinewidth=0.8,
                label=verbatim(task) if think or not any(row.think for row in known) else None,
            )
    plain(axes, "Accuracy by thinking tokens spent")
    shares(axes)
    axes.set_xlim(left=-0.03 * max(1.0, axes.get_xlim()[1]))
    axes.set_xlabel("thinking tokens of a reply, mean", fontsize=9, color=INK)
    axes.set_ylabel("accuracy", fontsize=9, color=INK)
    axes.xaxis.set_major_formatter(lambda x, place: f"{x:,.0f}")
    axes.grid(color=FAINT, linewidth=0.6)
    if handles := axes.get_legend_handles_labels()[0]:
        columns = min(len(handles), 4)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return as_png(figure)
