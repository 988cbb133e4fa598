"""Labels of pictures that can be read: as many as there is room for, apart from each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paramstats._core import format as rendering

SMALL = 8.0
"""Points, of labels."""

LINE_HEIGHT = SMALL * 1.35 / 72
"""Inches, from one line of small text to the next."""

LONGEST_NAME = 36


def shown(names: Sequence[str]) -> list[str]:
    """Names that fit beside a picture, each on one line, and differ as the names do.

    What all begin with goes first, then the middle of each, as far as they stay different.
    """
    plain = [name if name.isprintable() else repr(name)[1:-1] for name in names]
    if max(map(len, plain), default=0) > LONGEST_NAME and len(plain) > 1:
        ends = zip(min(plain), max(plain), strict=False)  # what these share, all do
        common = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ends))
        common = common.rpartition(".")[0]
        if len(common) > 2:
            plain = [f"…{name[len(common) + 1 :]}" for name in plain]
    width = LONGEST_NAME
    short = [rendering.elide(name, width) for name in plain]
    while len(set(short)) < len(set(plain)):
        width += 4
        short = [rendering.elide(name, width) for name in plain]
    return short


def room(ax: Axes) -> int:
    """How many lines of small text stand above each other along the axes."""
    figure = root(ax)
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()  # the layout decides how high the axes are
    height = ax.get_window_extent().height / figure.dpi
    return max(1, int(height / LINE_HEIGHT))


def root(ax: Axes) -> Figure:
    """The figure, also of axes in a part of one."""
    return ax.figure.canvas.figure


def label_ends(ax: Axes, drawn: list[tuple[str, Line2D]]) -> int:
    """Names at the right, each beside its line's end; where they are too many, some at even ranks
    from the highest line to the lowest. Returns how many."""
    ax.set_ylim(ax.get_ylim())  # ends stay where they are
    fits = room(ax)
    ends = sorted((_end(ax, line), i) for i, (_, line) in enumerate(drawn))
    if len(ends) > fits:
        ends = [ends[round(i * (len(ends) - 1) / (fits - 1 or 1))] for i in range(fits)]
    places = spread([end for end, _ in ends], 1 / fits, 0.5 / fits, 1 - 0.5 / fits)
    names = shown([drawn[i][0] for _, i in ends])
    for (end, i), name, place in zip(ends, names, places, strict=True):
        line = drawn[i][1]
        ax.annotate(
            name,
            xy=(1, end),
            xytext=(1.03, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            color=line.get_color(),
            fontsize=SMALL,
            parse_math=False,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": line.get_color(),
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )
    return len(ends)


def _end(ax: Axes, line: Line2D) -> float:
    """The height of a line's last point, in parts of the axes'."""
    values = np.asarray(line.get_ydata(), dtype=np.float64)
    last = values[~np.isnan(values)][-1]
    height = ax.transAxes.inverted().transform(ax.transData.transform((0, last)))[1]
    return float(np.clip(height, 0, 1)) if math.isfinite(height) else 0.0


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart within [low, high], as near to the ascending `wanted` as the
    least squares of the distances allow."""
    # With i * gap taken from the i-th position, "at least gap apart" reads "not decreasing":
    # isotonic regression, which pools neighbours in the wrong order into their mean.
    pools: list[tuple[float, int]] = []
    for i, position in enumerate(wanted):
        pools.append((position - i * gap, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, m), (b, n) = pools[-2:]
            pools[-2:] = [((a * m + b * n) / (m + n), m + n)]
    highest = high - (len(wanted) - 1) * gap
    levels = [max(low, min(level, highest)) for level, size in pools for _ in range(size)]
    return [level + i * gap for i, level in enumerate(levels)]
