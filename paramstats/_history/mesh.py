"""What all heat maps share: columns of steps, colors and their meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colorbar import Colorbar
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.patches import Patch

from paramstats._history import axes
from paramstats._history.tensor_series import Array, Bools

MAX_COLUMNS = 900
"""Maximum number of columns. With more entries, neighboring ones share a column."""

_LOW_QUANTILE, _HIGH_QUANTILE = 0.01, 0.999
"""Ends of the color scale, so that a few outliers do not flatten the contrast of all others."""

_MAX_RANGE = 1e6
"""Limit for high / low of the color scale. Gradients that are zero except for rounding, such as
those of a key bias in attention, would otherwise flatten the contrast."""

_COLORBAR_INCHES = 0.12

ORDINARY, MISSING, ZERO, NONFINITE = -1, 0, 1, 2
SPECIAL_COLORS = ("#ffffff", "#c3c8cd", axes.NONFINITE_COLOR)
"""White, grey and vermilion. None is in viridis, and they also differ in lightness."""


_MARK: Any = {"linestyle": "", "color": axes.NONFINITE_COLOR, "markersize": 4, "clip_on": False}


def column_edges(steps: npt.NDArray[np.int64]) -> Array:
    """Return the edges of the columns: halfway between neighboring steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    first, last = steps[0] - (middles[0] - steps[0]), steps[-1] + (steps[-1] - middles[-1])
    return np.array([first, *middles, last], dtype=np.float64)


def joined(sizes: Array, is_nonfinite: Bools, edges: Array) -> tuple[Array, Bools, Array]:
    """Join neighboring columns until there are at most `MAX_COLUMNS`.

    A joined column shows the largest magnitude and any NaN: that is what people look for.
    """
    n = sizes.shape[1]
    if n <= MAX_COLUMNS:
        return sizes, is_nonfinite, edges
    starts = np.arange(MAX_COLUMNS) * n // MAX_COLUMNS
    largest = np.fmax.reduceat(sizes, starts, axis=1)
    any_nonfinite = np.logical_or.reduceat(is_nonfinite, starts, axis=1)
    return largest, any_nonfinite, edges[[*starts, n]]


def color_scale(sizes: Array, is_log: bool) -> tuple[Normalize, str]:
    """Return the color scale, and at which of its ends values lie outside."""
    if not sizes.size:
        return Normalize(0, 1), "neither"
    if not is_log:
        return Normalize(float(sizes.min()), float(sizes.max()) or 1.0), "neither"
    low, high = (float(q) for q in np.quantile(sizes, (_LOW_QUANTILE, _HIGH_QUANTILE)))
    low = max(low, high / _MAX_RANGE)
    if high < 2 * low:  # almost equal values get almost equal colors
        low, high = low / 2, high * 2
    below, above = bool((sizes < low).any()), bool((sizes > high).any())
    extend = {(1, 1): "both", (1, 0): "min", (0, 1): "max", (0, 0): "neither"}[below, above]
    return LogNorm(low, high), extend


def draw_cells(
    ax: Axes,
    edges: Array,
    rows: Array,
    sizes: Array,
    special: npt.NDArray[np.int64],
    norm: Normalize,
) -> QuadMesh:
    """Draw cells in the colors of their sizes, or in that of what `special` says.

    Args:
        ax: where to draw.
        edges, rows: the edges of columns and rows.
        sizes: of shape (rows, columns).
        special: ORDINARY, or what a cell is instead of a size; of the same shape.
        norm: the color scale of the sizes.

    Returns:
        The cells with the sizes.
    """
    ordinary = np.ma.masked_array(sizes, special != ORDINARY)
    mesh = ax.pcolormesh(edges, rows, ordinary, norm=norm, cmap="viridis", rasterized=True)
    ax.pcolormesh(
        edges,
        rows,
        np.ma.masked_equal(special, ORDINARY),
        cmap=ListedColormap(SPECIAL_COLORS),
        vmin=0,
        vmax=len(SPECIAL_COLORS) - 1,
        rasterized=True,
    )
    return mesh


def add_colorbar(ax: Axes, mesh: QuadMesh, extend: str) -> Colorbar:
    """Add a color scale at the right of the axes."""
    extent = ax.get_window_extent()
    wide, high = (_COLORBAR_INCHES * ax.figure.dpi / s for s in (extent.width, extent.height))
    bar_axes = ax.inset_axes((1 + wide, 0, wide, 1))  # a separate Axes would shrink this one
    bar = ax.figure.colorbar(mesh, cax=bar_axes, extend=extend, extendfrac=high)
    bar.ax.tick_params(labelsize=axes.SMALL, which="both")
    return bar


def add_meanings(ax: Axes, special: npt.NDArray[np.int64], meanings: Mapping[int, str]) -> None:
    """Add a legend for the special cells that there are."""
    patches = [
        Patch(facecolor=SPECIAL_COLORS[code], edgecolor="#616e7c", linewidth=0.5, label=meaning)
        for code, meaning in meanings.items()
        if (special == code).any()
    ]
    if patches:
        axes.add_legend(ax, patches)


def mark_columns(ax: Axes, edges: Array, is_nonfinite: Bools) -> None:
    """Point from above at columns with marked cells, which may be one pixel wide."""
    columns = ((edges[1:] + edges[:-1]) / 2)[is_nonfinite.any(axis=0)]
    top = np.full(len(columns), 1 + 3 / ax.get_window_extent().height)
    ax.plot(columns, top, transform=ax.get_xaxis_transform(), marker="v", **_MARK)


def mark_rows(ax: Axes, is_nonfinite: Bools) -> None:
    """Point from the right at rows 0, 1, ... with marked cells, which may be one pixel high."""
    rows = np.nonzero(is_nonfinite.any(axis=1))[0] + 0.5
    right = np.full(len(rows), 1 + 3 / ax.get_window_extent().width)
    ax.plot(right, rows, transform=ax.get_yaxis_transform(), marker="<", **_MARK)
