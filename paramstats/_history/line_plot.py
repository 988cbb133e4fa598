"""Draw a statistic over steps: a line per tensor, labelled at its end."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paramstats._history import axes
from paramstats._history.cells import Cells
from paramstats._history.labels import label_lines
from paramstats._history.tensor_series import Array

_COLORS = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#616e7c"),  # Okabe and Ito, grey
    *("#332288", "#999933", "#882255", "#44aa99"),  # Tol
)
"""Colors of up to ten lines. More lines get viridis, in the model's order."""

_ON_LIGHT, _ON_DARK = (0.0, 0.8), (0.35, 1.0)
"""The parts of viridis in which text can be read."""

_LOG_RANGE = 20
"""The axis is logarithmic if the largest value is more than so many times the smallest."""


def draw_lines(data: Cells, ax: Axes | None) -> Figure:
    """Draw a line per tensor, and mark steps with NaN or infinite elements; return the figure."""
    steps, names, stat, kind, values, is_nonfinite = data
    ax = ax or axes.new_axes(len(names) + 6, 3.2)
    lines: list[tuple[str, Line2D]] = []
    finite = np.where(np.isfinite(values), values, np.nan)
    for name, color, row in zip(names, _colors(ax, len(names)), finite, strict=True):
        (line,) = ax.plot(steps, row, color=color, linewidth=1.3, label=name)
        if len(steps) < 30:
            line.set_marker(".")
        if not np.isnan(row).all():
            lines.append((name, line))
    if axes.is_magnitude(stat) and _spans_orders(finite):
        ax.set_yscale("log")
    is_marked = is_nonfinite.any(axis=0)
    if is_marked.any():
        (mark,) = ax.plot(
            steps[is_marked],
            np.full(is_marked.sum(), 0.02),
            transform=ax.get_xaxis_transform(),
            linestyle="",
            marker="x",
            color=axes.NONFINITE_COLOR,
            label="NaN or Inf",
        )
        axes.add_legend(ax, [mark])
    axes.format_axes(ax, steps[0], steps[-1])
    labelled = label_lines(ax, lines)
    note = "" if labelled == len(lines) else f" ({labelled} of {len(lines)} labelled)"
    ax.set_title(axes.title(stat, kind) + note, loc="left")
    return axes.figure_of(ax)


def _spans_orders(values: Array) -> bool:
    positive = values[values > 0]
    return positive.size > 0 and positive.max() > _LOG_RANGE * positive.min()


def _colors(ax: Axes, count: int) -> list[object]:
    if count <= len(_COLORS):
        return list(_COLORS[:count])
    is_dark = np.mean(to_rgb(ax.get_facecolor())) < 0.5
    return list(colormaps["viridis"](np.linspace(*(_ON_DARK if is_dark else _ON_LIGHT), count)))
