"""Draw a statistic of many tensors over steps as colors: a row per tensor, a column per entry."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paramstats._core.options import STATS
from paramstats._history import axes, mesh
from paramstats._history.cells import Cells
from paramstats._history.labels import label_capacity, shortened

_SIGNED = {"mean", "min", "max", "skewness"}

_MIN_USE = 0.25
"""Least part of the label capacity to use before labels go one module level deeper."""


def draw_heatmap(data: Cells, ax: Axes | None) -> Figure:
    """Draw a row per tensor and a column per step; return the figure."""
    steps, names, stat, kind, values, is_nonfinite = data
    is_nonfinite = np.isinf(values) | (np.isnan(values) & is_nonfinite)
    sizes = np.abs(np.where(is_nonfinite, np.nan, values))
    sizes, is_nonfinite, edges = mesh.joined(sizes, is_nonfinite, mesh.column_edges(steps))
    is_log = axes.is_magnitude(stat) or stat in _SIGNED
    is_special = [is_nonfinite, np.isnan(sizes), is_log & (sizes == 0)]
    codes = (mesh.NONFINITE, mesh.MISSING, mesh.ZERO)
    special = np.select(is_special, codes, mesh.ORDINARY)

    ax = ax or axes.new_axes(1.13 * len(names) + 8, 2.6)
    norm, extend = mesh.color_scale(sizes[special == mesh.ORDINARY], is_log)
    cells = mesh.draw_cells(ax, edges, np.arange(len(names) + 1.0), sizes, special, norm)
    ax.set_ylim(len(names), 0)
    if is_nonfinite.any():
        mesh.mark_columns(ax, edges, is_nonfinite)
        mesh.mark_rows(ax, is_nonfinite)
    if (special == mesh.ORDINARY).any():
        mesh.add_colorbar(ax, cells, extend)
    missing = "no gradient" if kind == "grad" and stat in STATS else "not known"
    meanings = {mesh.MISSING: missing, mesh.ZERO: "zero", mesh.NONFINITE: "NaN or Inf"}
    mesh.add_meanings(ax, special, meanings)
    axes.format_axes(ax, edges[0], edges[-1])
    note = ", magnitude" if stat in _SIGNED or "_cosine_" in stat else ""
    ax.set_title(axes.title(stat, kind) + note, loc="left")
    _label_rows(ax, names)
    return axes.figure_of(ax)


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
