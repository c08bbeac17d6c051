"""How our plots look."""

import io
from typing import Any

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f7f7f", "#000000")  # Okabe and Ito's
MARKERS = "osD^vP*X"
INK, FAINT = "#333333", "#d9d9d9"


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches; not one of pyplot's: no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Any, title: str) -> None:
    """Title, spines and ticks."""
    axes.set_title(verbatim(title), fontsize=10, color=INK, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.set_axisbelow(True)


def verbatim(text: str) -> str:
    """A name as a label that isn't read as a formula; ticks of logarithmic axes are formulas, so it can't be off."""
    return text.replace("$", r"\$")


def shares(axes: Any) -> None:
    """A y axis from 0 to 100 %."""
    axes.yaxis.set_major_formatter(lambda y, place: f"{y:.0%}")
    axes.set_ylim(0, 1.08)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])


def as_png(figure: Any) -> bytes:
    """The same figure gives the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
