"""Place the labels of plots so that they do not overlap, and shorten them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from paramstats._core.format import elide, one_line_name
from paramstats._history.axes import LINE_HEIGHT, SMALL, figure_of

MAX_NAME_LENGTH = 36


def shortened(names: Sequence[str]) -> list[str]:
    """Return the names on one line each, shortened to fit next to a plot.

    The prefix that all share is left out first, then the middle of each. Different names stay
    different, so a result may be longer than `MAX_NAME_LENGTH`.
    """
    plain = [one_line_name(name) for name in names]
    if max(map(len, plain), default=0) > MAX_NAME_LENGTH and len(plain) > 1:
        pairs = zip(min(plain), max(plain), strict=False)  # their shared prefix is that of all
        prefix = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        prefix = prefix.rpartition(".")[0]
        if len(prefix) > 2:
            plain = [f"…{name[len(prefix) + 1 :]}" for name in plain]
    for width in itertools.count(MAX_NAME_LENGTH, 4):
        short = [elide(name, width) for name in plain]
        if len(set(short)) == len(set(plain)):
            break
    return short


def label_capacity(ax: Axes) -> int:
    """Return how many lines of small text fit above each other along the axes."""
    figure = figure_of(ax)
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()  # the layout engine sets the height of the axes
    height = ax.get_window_extent().height / figure.dpi
    return max(1, int(height / LINE_HEIGHT))


def label_lines(ax: Axes, lines: list[tuple[str, Line2D]]) -> int:
    """Write each line's name to the right of its end, and return the number of labels.

    If there are too many lines, those at evenly spaced ranks from top to bottom are labelled.
    """
    ax.set_ylim(ax.get_ylim())  # keeps the ends where they are
    capacity = label_capacity(ax)
    ends = sorted((_end_height(ax, line), i) for i, (_, line) in enumerate(lines))
    if len(ends) > capacity:
        last = len(ends) - 1
        ends = [ends[round(i * last / max(capacity - 1, 1))] for i in range(capacity)]
    half = 0.5 / capacity
    heights = spread([end for end, _ in ends], 1 / capacity, half, 1 - half)
    names = shortened([lines[i][0] for _, i in ends])
    for (end, i), name, height in zip(ends, names, heights, strict=True):
        color = lines[i][1].get_color()
        ax.annotate(
            name,
            xy=(1, end),
            xytext=(1.03, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            color=color,
            fontsize=SMALL,
            parse_math=False,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )
    return len(ends)


def _end_height(ax: Axes, line: Line2D) -> float:
    """Return the height of a line's last point as a fraction of the axes."""
    values = np.asarray(line.get_ydata(), dtype=np.float64)
    last = values[~np.isnan(values)][-1]
    height = ax.transAxes.inverted().transform(ax.transData.transform((0, last)))[1]
    return float(np.clip(height, 0, 1)) if math.isfinite(height) else 0.0


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return positions near the ascending `wanted`, at least `gap` apart, within [low, high]."""
    places: list[float] = []
    for position in wanted:  # push up where the one below is too near
        places.append(max(position, places[-1] + gap if places else low))
    for i in reversed(range(len(places))):  # push down from the upper limit
        places[i] = min(places[i], high)
        high = places[i] - gap
    return places
