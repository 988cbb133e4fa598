"""What line plots and heat maps share: figure, title, legend, axes.

Figures are made without pyplot, which would keep them in memory, choose a GUI backend and change
the caller's current figure. `import paramstats` needs no matplotlib.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from paramstats._core.format import one_line_name

WIDTH = 9.0
"""Inches: 900 pixels at matplotlib's default resolution, the width of a README."""

SMALL = 8.0
"""Font size of labels, in points."""

LINE_HEIGHT = SMALL * 1.35 / 72
"""Inches from one line of small text to the next."""

NONFINITE_COLOR = "#d55e00"
"""Vermilion, for NaN and infinities. It differs from viridis and from the colors of lines for every
kind of color vision."""

_TITLES = {
    "norm": "L2 norm",
    "rms": "root mean square",
    "std": "standard deviation",
    "var": "variance",
    "abs_max": "maximum magnitude",
    "abs_mean": "mean magnitude",
    "min": "minimum",
    "max": "maximum",
}
_KINDS = {"grad": "gradient", "param": "parameter"}
_DERIVED_TITLES = {
    "min_update_ratio": "minimum update ratio since the previous entry",
    "update_ratio": "update ratio",
    "optimizer_rms": "gradients relative to Adam's second moment, root mean square",
    "optimizer_eps_fraction": "share of elements with a second moment below Adam's eps",
}
_MAGNITUDES = {
    *("norm", "rms", "std", "var", "abs_max", "abs_mean", "kurtosis"),
    *("min_update_ratio", "update_ratio", "optimizer_rms"),
}


class NotebookFigure(Figure):
    """A figure that a notebook displays without pyplot."""

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png")
        return out.getvalue()


def new_axes(lines: float, at_least: float) -> Axes:
    """Return the axes of a new figure that is `lines` lines of text high, within limits."""
    height = float(np.clip(LINE_HEIGHT * lines, at_least, 8.5))
    return NotebookFigure(figsize=(WIDTH, height), layout="constrained").add_subplot()


def figure_of(ax: Axes) -> Figure:
    """Return the whole figure, also for axes in a subfigure."""
    return ax.figure.canvas.figure


def title(stat: str, kind: str) -> str:
    """Return the title of a plot, such as "gradient L2 norm"."""
    if stat in _DERIVED_TITLES:
        return _DERIVED_TITLES[stat]
    if "_cosine_" in stat:
        a, b = (_KINDS.get(one, one) for one in stat.split("_cosine_"))
        return f"cosine of {a} and {b}"
    return f"{_KINDS.get(kind, one_line_name(kind))} {_TITLES.get(stat, stat.replace('_', ' '))}"


def is_magnitude(stat: str) -> bool:
    """Return whether a statistic is not negative and its order of magnitude matters."""
    return stat in _MAGNITUDES


def add_legend(ax: Axes, handles: Sequence[object]) -> None:
    """Add a legend above the axes, at the right."""
    ax.legend(
        handles=list(handles),
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.6,
        ncols=len(handles),
        frameon=False,
        fontsize=SMALL,
        handlelength=1.2,
    )


def format_axes(ax: Axes, first: float, last: float) -> None:
    """Label the axis of steps, which goes from `first` to `last`, and remove the frame."""
    ax.set_xlabel("step", fontsize=SMALL)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.tick_params(labelsize=SMALL)
    ax.spines[["top", "right"]].set_visible(False)
    if last > first:
        ax.set_xlim(first, last)
