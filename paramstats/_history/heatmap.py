"""Draw a statistic of many tensors over steps as colors: a row per tensor, a column per entry."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from paramstats._core.options import STATS
from paramstats._history import axes
from paramstats._history.cells import Cells
from paramstats._history.labels import label_capacity, shortened
from paramstats._history.tensor_series import Array, Bools

MAX_COLUMNS = 900
"""Maximum number of columns. With more entries, neighboring ones share a column."""

_SIGNED = {"mean", "min", "max"}
_LOW_QUANTILE, _HIGH_QUANTILE = 0.01, 0.999
"""Ends of the color scale, so that a few outliers do not flatten the contrast of all others."""

_MAX_RANGE = 1e6
"""Limit for high / low of the color scale. Gradients that are zero except for rounding, such as
those of a key bias in attention, would otherwise flatten the contrast."""

_MIN_USE = 0.25
"""Least part of the label capacity to use before labels go one module level deeper."""

_COLORBAR_INCHES = 0.12

_MISSING, _ZERO, _NONFINITE = 0, 1, 2
SPECIAL_COLORS = ("#ffffff", "#c3c8cd", axes.NONFINITE_COLOR)
"""White, grey and vermilion. None is in viridis, and they also differ in lightness."""


def draw_heatmap(data: Cells, ax: Axes | None) -> Figure:
    """Draw a row per tensor and a column per step; return the figure."""
    steps, names, stat, kind, values, is_nonfinite = data
    is_nonfinite = np.isinf(values) | (np.isnan(values) & is_nonfinite)
    sizes = np.abs(np.where(is_nonfinite, np.nan, values))
    sizes, is_nonfinite, edges = _joined(sizes, is_nonfinite, _edges(steps))
    is_log = axes.is_magnitude(stat) or stat in _SIGNED
    is_special = [is_nonfinite, np.isnan(sizes), is_log & (sizes == 0)]
    special = np.select(is_special, [_NONFINITE, _MISSING, _ZERO], -1)

    ax = ax or axes.new_axes(1.13 * len(names) + 8, 2.6)
    rows = np.arange(len(names) + 1)
    ordinary = np.ma.masked_array(sizes, special >= 0)
    norm, extend = _color_scale(ordinary.compressed(), is_log)
    mesh = ax.pcolormesh(edges, rows, ordinary, norm=norm, cmap="viridis", rasterized=True)
    ax.pcolormesh(
        edges,
        rows,
        np.ma.masked_less(special, 0),
        cmap=ListedColormap(SPECIAL_COLORS),
        vmin=0,
        vmax=len(SPECIAL_COLORS) - 1,
        rasterized=True,
    )
    ax.set_ylim(len(names), 0)
    if is_nonfinite.any():
        _mark(ax, is_nonfinite, edges)
    if ordinary.count():
        extent = ax.get_window_extent()
        wide, high = (_COLORBAR_INCHES * ax.figure.dpi / s for s in (extent.width, extent.height))
        bar_axes = ax.inset_axes((1 + wide, 0, wide, 1))  # a separate Axes would shrink this one
        bar = ax.figure.colorbar(mesh, cax=bar_axes, extend=extend, extendfrac=high)
        bar.ax.tick_params(labelsize=axes.SMALL)
    missing = "no gradient" if kind == "grad" and stat in STATS else "not known"
    meanings = {_MISSING: missing, _ZERO: "zero", _NONFINITE: "NaN or Inf"}
    patches = [
        Patch(facecolor=SPECIAL_COLORS[code], edgecolor="#616e7c", linewidth=0.5, label=meaning)
        for code, meaning in meanings.items()
        if (special == code).any()
    ]
    if patches:
        axes.add_legend(ax, patches)
    axes.format_axes(ax, edges[0], edges[-1])
    note = ", magnitude" if stat in _SIGNED or "_cosine_" in stat else ""
    ax.set_title(axes.title(stat, kind) + note, loc="left")
    _label_rows(ax, names)
    return axes.figure_of(ax)


def _mark(ax: Axes, is_nonfinite: Bools, edges: Array) -> None:
    """Point from above and from the right at non-finite cells, which may be one pixel high."""
    style: Any = {"linestyle": "", "color": axes.NONFINITE_COLOR, "markersize": 4, "clip_on": False}
    extent = ax.get_window_extent()
    columns = ((edges[1:] + edges[:-1]) / 2)[is_nonfinite.any(axis=0)]
    top = np.full(len(columns), 1 + 3 / extent.height)
    ax.plot(columns, top, transform=ax.get_xaxis_transform(), marker="v", **style)
    rows = np.nonzero(is_nonfinite.any(axis=1))[0] + 0.5
    right = np.full(len(rows), 1 + 3 / extent.width)
    ax.plot(right, rows, transform=ax.get_yaxis_transform(), marker="<", **style)


def _edges(steps: npt.NDArray[np.int64]) -> Array:
    """Return the edges of the columns: halfway between neighboring steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    first, last = steps[0] - (middles[0] - steps[0]), steps[-1] + (steps[-1] - middles[-1])
    return np.array([first, *middles, last], dtype=np.float64)


def _joined(sizes: Array, is_nonfinite: Bools, edges: Array) -> tuple[Array, Bools, Array]:
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


def _color_scale(sizes: Array, is_log: bool) -> tuple[Normalize, str]:
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


def _label_rows(ax: Axes, names: Sequence[str]) -> None:
    """Label the rows with their names or, if these do not fit, blocks of rows with their module."""
    capacity = label_capacity(ax)
    blocks = module_blocks(names, capacity)
    gap = len(names) / capacity
    placed: list[tuple[float, str]] = []
    for start, stop, name in sorted(blocks, key=lambda block: block[0] - block[1]):
        middle = (start + stop) / 2
        if all(abs(middle - other) >= gap for other, _ in placed):
            placed.append((middle, name))
    ax.set_yticks([middle for middle, _ in placed], shortened([name for _, name in placed]))
    for label in ax.get_yticklabels():
        label.set_parse_math(False)
    ax.tick_params(axis="y", length=0)
    if len(blocks) < len(names):
        ax.set_yticks([start for start, _, _ in blocks], minor=True)  # where a block begins
        ax.tick_params(axis="y", which="minor", length=4, width=0.5)


def module_blocks(names: Sequence[str], capacity: int) -> list[tuple[int, int, str]]:
    """Group neighboring names by module, as deep as `capacity` labels allow.

    If that leaves most of the capacity unused, as in a model of very many layers, it groups one
    level deeper, and some labels will not fit.

    Returns:
        (first row, row after the last, module or name) of each block.
    """
    deeper: list[tuple[int, int, str]] = []
    for depth in range(max(name.count(".") for name in names) + 1, 0, -1):
        blocks = _blocks_at(names, depth)
        if len(blocks) <= capacity:
            return deeper if deeper and len(blocks) < capacity * _MIN_USE else blocks
        deeper = blocks
    return deeper


def _blocks_at(names: Sequence[str], depth: int) -> list[tuple[int, int, str]]:
    """Group neighbors with the same first `depth` parts; a single tensor keeps its whole name."""
    blocks = []
    start = 0
    for module, members in itertools.groupby(names, lambda name: name.split(".")[:depth]):
        stop = start + len(list(members))
        blocks.append((start, stop, ".".join(module) if stop - start > 1 else names[start]))
        start = stop
    return blocks
