"""A whole model over steps: a row for each tensor, a column for each entry, colours for statistics."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from paramstats._history import plotting
from paramstats._history.labels import LINE_HEIGHT, SMALL, room, root, shown
from paramstats._history.series import Array
from paramstats._history.states import States

if TYPE_CHECKING:
    from paramstats._history import History

MOST_COLUMNS = 900
"""A pixel each in a README; of more entries, neighbours share a column."""

_SIGNED = {"mean", "min", "max"}
_DARKEST, _BRIGHTEST = 0.01, 0.999
"""Quantiles at the ends of the colours, so that a few cells cannot take the contrast from all."""

_WIDEST = 1e6
"""Between the ends of the colours: gradients that are zero but for rounding, such as those of the
bias of an attention's keys, would make one colour of all others."""

_LEAST_USE = 0.25
"""Of the room for labels."""

_BAR = 0.12
"""Inches: how thick the bar of colours is."""

_MISSING, _ZERO, _BAD = 0, 1, 2
_COLOURS = ("#ffffff", "#c3c8cd", plotting.BAD)
"""White, grey, vermilion: none is in viridis, and they differ in lightness, too."""


def heatmap(
    history: History, names: Sequence[str], stat: str, kind: str, ax: Axes | None
) -> Figure:
    known = set(history.names)
    names = [name for name in names if name in known]  # the total is no row
    values, bad = _cells(history, names, stat, kind)
    if np.isnan(values).all() and not bad.any():
        raise plotting.nothing(kind)
    edges = _edges(history.steps)
    values, bad, edges = _at_most(MOST_COLUMNS, values, bad, edges)
    is_log = plotting.is_a_size(stat) or stat in _SIGNED
    sizes = np.abs(values)
    special = np.select([bad, np.isnan(sizes), is_log & (sizes == 0)], [_BAD, _MISSING, _ZERO], -1)

    ax = ax or plotting.new_axes(float(np.clip(1.2 + LINE_HEIGHT * 1.13 * len(names), 2.6, 8.5)))
    places = np.arange(len(names) + 1)
    plain = np.ma.masked_array(sizes, special >= 0)
    colours, extend = _normalised(plain, is_log)
    mesh = ax.pcolormesh(edges, places, plain, norm=colours, cmap="viridis", rasterized=True)
    ax.pcolormesh(
        edges,
        places,
        np.ma.masked_less(special, 0),
        cmap=ListedColormap(_COLOURS),
        vmin=0,
        vmax=len(_COLOURS) - 1,
        rasterized=True,
    )
    ax.set_ylim(len(names), 0)
    if bad.any():
        _mark(ax, bad, edges)
    if plain.count():
        extent = ax.get_window_extent()
        wide, high = (_BAR * ax.figure.dpi / size for size in (extent.width, extent.height))
        beside = ax.inset_axes((1 + wide, 0, wide, 1))  # not a sibling, which would change the axes
        bar = ax.figure.colorbar(mesh, cax=beside, extend=extend, extendfrac=high)
        bar.ax.tick_params(labelsize=SMALL)
    nothing = "no gradient" if kind == "grad" and stat != "min_update_ratio" else "not known"
    meanings = (nothing, "zero", "NaN or Inf")
    patches = [
        Patch(facecolor=_COLOURS[code], edgecolor="#616e7c", linewidth=0.5, label=meanings[code])
        for code in (_MISSING, _ZERO, _BAD)
        if (special == code).any()
    ]
    if patches:
        plotting.legend(ax, patches)
    plotting.finish(ax, [])
    ax.set_xlim(edges[0], edges[-1])
    magnitude = ", magnitude" if stat in _SIGNED else ""
    ax.set_title(plotting.title(stat, kind) + magnitude, loc="left")
    _label_rows(ax, names)
    return root(ax)


def _mark(ax: Axes, bad: npt.NDArray[np.bool_], edges: Array) -> None:
    """Points from above and from the right at cells with NaN, which may be a pixel high."""
    rows, columns = np.nonzero(bad.any(axis=1))[0], np.nonzero(bad.any(axis=0))[0]
    style: Any = {"linestyle": "", "color": plotting.BAD, "markersize": 4, "clip_on": False}
    middles = (edges[1:] + edges[:-1]) / 2
    ax.plot(
        middles[columns],
        np.full(len(columns), 1 + 3 / ax.get_window_extent().height),
        transform=ax.get_xaxis_transform(),
        marker="v",
        **style,
    )
    ax.plot(
        np.full(len(rows), 1 + 3 / ax.get_window_extent().width),
        rows + 0.5,
        transform=ax.get_yaxis_transform(),
        marker="<",
        **style,
    )


def _cells(
    history: History, names: Sequence[str], stat: str, kind: str
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Statistics by name and entry, NaN where there is none; where one is NaN or infinite itself."""
    summaries = [summary for _, summary in history]
    if stat == "min_update_ratio":
        states = States(summaries, names, "param")
        return states.min_update_ratio(), states.has_nonfinite
    states = States(summaries, names, kind)
    values = states.statistics(stat)
    bad = np.isinf(values) | (np.isnan(values) & states.has_nonfinite)
    return np.where(bad, np.nan, values), bad


def _edges(steps: npt.NDArray[np.int64]) -> Array:
    """Columns reach to the middle between their step and the next, wherever that is."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    first, last = steps[0] - (middles[0] - steps[0]), steps[-1] + (steps[-1] - middles[-1])
    return np.array([first, *middles, last], dtype=np.float64)


def _at_most(
    most: int, values: Array, bad: npt.NDArray[np.bool_], edges: Array
) -> tuple[Array, npt.NDArray[np.bool_], Array]:
    """Neighbours joined until there are few enough columns: the greatest magnitude stays, and a
    NaN anywhere, for those are what one looks for."""
    n = values.shape[1]
    if n <= most:
        return values, bad, edges
    starts = np.unique(np.arange(most) * n // most)
    greatest = np.fmax.reduceat(np.abs(values), starts, axis=1)
    worst = np.logical_or.reduceat(bad, starts, axis=1)
    return greatest, worst, edges[[*starts, n]]


def _normalised(plain: np.ma.MaskedArray, is_log: bool) -> tuple[Normalize, str]:
    """From statistics to colours, and at which ends some lie beyond."""
    cells = plain.compressed()
    if not cells.size:
        return Normalize(0, 1), "neither"
    if not is_log:
        return Normalize(float(cells.min()), float(cells.max()) or 1.0), "neither"
    low, high = (float(np.quantile(cells, q)) for q in (_DARKEST, _BRIGHTEST))
    low = max(low, high / _WIDEST)
    if high < 2 * low:  # next to nothing to tell apart: neither colours it as if there were
        low, high = low / 2, high * 2
    below, above = bool((cells < low).any()), bool((cells > high).any())
    extend = {(1, 1): "both", (1, 0): "min", (0, 1): "max", (0, 0): "neither"}[below, above]
    return LogNorm(low, high), extend


def _label_rows(ax: Axes, names: Sequence[str]) -> None:
    """Names where there is room for all, else those of the blocks that they begin with."""
    fits = room(ax)
    blocks = _blocks(names, fits)
    least = len(names) / fits
    placed: list[tuple[float, str]] = []
    for start, stop, name in sorted(blocks, key=lambda block: block[0] - block[1]):
        middle = (start + stop) / 2
        if all(abs(middle - other) >= least for other, _ in placed):
            placed.append((middle, name))
    ax.set_yticks([middle for middle, _ in placed], shown([name for _, name in placed]))
    for label in ax.get_yticklabels():
        label.set_parse_math(False)
    ax.tick_params(axis="y", length=0)
    if len(blocks) < len(names):
        ax.set_yticks([start for start, _, _ in blocks], minor=True)  # where one begins
        ax.tick_params(axis="y", which="minor", length=4, width=0.5)


def _blocks(names: Sequence[str], fits: int) -> list[tuple[int, int, str]]:
    """(first row, row after the last, name) of names with the same beginning, as deep into the
    modules as there is room for.

    Where that would leave most of the room unused, as in a model of very many layers, one level
    deeper, whose labels do not all fit.
    """
    deeper: list[tuple[int, int, str]] = []
    for depth in range(max(name.count(".") for name in names) + 1, 0, -1):
        found = _runs(names, depth)
        if len(found) <= fits:
            return deeper if deeper and len(found) < fits * _LEAST_USE else found
        deeper = found
    return deeper


def _runs(names: Sequence[str], depth: int) -> list[tuple[int, int, str]]:
    """Neighbours whose names begin with the same `depth` parts; one alone keeps its whole name."""
    heads = [".".join(name.split(".")[:depth]) for name in names]
    runs = []
    start = 0
    for head, members in itertools.groupby(heads):
        stop = start + len(list(members))
        runs.append((start, stop, head if stop - start > 1 else names[start]))
        start = stop
    return runs
