"""The plot of an ablation: a panel for each measure that has something to draw, a colour for each variant."""

from collections.abc import Sequence

from nemo_bluelm.evaluate.measures import CHANGE, NATS, SHARE, Measure, Measured
from nemo_bluelm.report.ablation_table import shown
from nemo_bluelm.report.plot_style import COLOURS, FAINT, INK, MARKERS, as_png, new_figure, plain, shares, verbatim

_PANEL = 4.6, 3.4  # inches
_IN_A_ROW = 2


def plot(labels: Sequence[str], measures: Sequence[Measure], found: Sequence[dict[str, Measured]]) -> bytes:
    """A PNG.

    Args:
        labels: of the variants.
        found: by the measure's name, for each variant.
    """
    drawn = [m for m in measures if any(of[m.name].curve or of[m.name].drawn for of in found)]
    columns = max(1, min(_IN_A_ROW, len(drawn)))
    rows = max(1, -(-len(drawn) // columns))
    figure = new_figure(_PANEL[0] * columns, _PANEL[1] * rows + 0.5)
    for number, measure in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, number + 1)
        of = [variant[measure.name] for variant in found]
        (_curves if any(measured.curve for measured in of) else _bars)(axes, measure, of)
        plain(axes, measure.title)
    keys = _legend(labels)
    figure.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), 6), frameon=False, fontsize=9)
    return as_png(figure)


def _legend(labels: Sequence[str]) -> list:
    from matplotlib.patches import Patch

    return [Patch(color=COLOURS[number % len(COLOURS)], label=verbatim(label)) for number, label in enumerate(labels)]


def _bars(axes, measure: Measure, found: Sequence[Measured]) -> None:
    """A group for each number, a bar in it for each variant, its value above."""
    names = list(dict.fromkeys(number.name for measured in found for number in measured.drawn))
    width = 0.8 / len(found)
    for variant, measured in enumerate(found):
        values = {number.name: number.value for number in measured.drawn}
        for group, name in enumerate(names):
            value = values.get(name)
            if value is None:
                continue
            x = group + (variant - (len(found) - 1) / 2) * width
            axes.bar(x, value, width * 0.9, color=COLOURS[variant % len(COLOURS)])
            above = value >= 0
            text = shown(value, measure.unit)
            axes.annotate(
                text,
                (x, value),
                xytext=(0, 2 if above else -2),
                textcoords="offset points",
                ha="center",
                va="bottom" if above else "top",
                fontsize=8,
                color=INK,
            )
    several = len(names) > 1
    axes.set_xticks(range(len(names)) if several else [], [*map(verbatim, names)] if several else [])
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.axhline(0, color=FAINT, linewidth=0.8)
    axes.margins(y=0.15)
    _scale(axes, measure)


def _curves(axes, measure: Measure, found: Sequence[Measured]) -> None:
    for variant, measured in enumerate(found):
        if not measured.curve:
            continue
        xs, ys = zip(*measured.curve)
        few = len(xs) <= 16
        axes.plot(
            xs,
            ys,
            color=COLOURS[variant % len(COLOURS)],
            marker=MARKERS[variant % len(MARKERS)] if few else None,
            markersize=5,
            linewidth=1.6,
            clip_on=False,
        )
        if few:
            axes.set_xticks(xs)
        else:
            axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(measure.axes[0], fontsize=9, color=INK)
    axes.set_ylabel(measure.axes[1], fontsize=9, color=INK)
    axes.xaxis.set_major_formatter(lambda x, place: f"{x:,.0f}")
    axes.grid(color=FAINT, linewidth=0.6)
    _scale(axes, measure)


def _scale(axes, measure: Measure) -> None:
    if measure.unit == NATS:
        return
    if measure.unit == SHARE:
        shares(axes)
        return
    sign = "+" if measure.unit == CHANGE else ""
    axes.yaxis.set_major_formatter(lambda y, place: f"{y * 100:{sign if y else ''}.3g}%")
    if measure.unit == CHANGE:
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
