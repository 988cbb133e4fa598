"""Draw the entries of a history: lines for few tensors, a heat map for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from paramstats._core.derived import DERIVED
from paramstats._core.entries import column_kinds
from paramstats._core.options import DISTRIBUTION_STATS, STATS
from paramstats._history import cells, heatmap, line_plot
from paramstats._history.json_lines import Entry
from paramstats._history.selection import Names, check_plot, choose
from paramstats._history.series import TotalSeries
from paramstats._summary import layout_of, record_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


READ_DISTRIBUTION = "summarize(model, distribution=True) reads those of tensors and gradients"
"""What to do if there is no distribution."""

_NAMES = {"grad": "gradients", "param": "statistics", "update": "updates"}


def draw(
    function: str,
    entries: Sequence[Entry],
    names: Names | None,
    stat: str,
    kind: str,
    ax: Axes | None,
    max_lines: int,
) -> Figure:
    """Draw a statistic over steps; the arguments are those of `History.plot`.

    Args:
        function: the name of the called function, for errors.
        entries: what to draw.
        names, stat, kind, ax: as in `History.plot`.
        max_lines: with more selected tensors than this, a heat map is drawn.
    """
    if not entries:
        raise ValueError(f"{function}: expected entries, got an empty history")
    records = [record_of(entry.summary) for entry in entries]
    check_plot(function, stat, kind, dict.fromkeys(k for r in records for k in column_kinds(r)))
    layouts = list(dict.fromkeys(layout_of(entry.summary) for entry in entries))
    chosen = choose(function, names, layouts)
    has_total = "total" in chosen and not any("total" in layout.index for layout in layouts)
    tensors = chosen[:-1] if has_total else chosen
    steps = np.array([entry.step for entry in entries], dtype=np.int64)
    data = cells.collect(steps, records, tensors, stat, kind)
    is_heatmap = len(chosen) > max_lines
    if has_total and not is_heatmap:
        if stat == "min_update_ratio":
            raise ValueError(f"{function}: expected names for min_update_ratio, got 'total'")
        total = TotalSeries(steps, [entry.summary.total for entry in entries])
        data = cells.with_total(data, total)
    if data.is_empty():
        what = stat if stat not in STATS else _NAMES.get(kind, f"statistics of {kind}")
        remedy = _remedy(stat, kind)
        raise ValueError(f"{function}: expected {what}, got none at any step{remedy}")
    return heatmap.draw_heatmap(data, ax) if is_heatmap else line_plot.draw_lines(data, ax)


def _remedy(stat: str, kind: str) -> str:
    """Return what to do if there is nothing to draw."""
    if stat in DERIVED or (stat in STATS and kind == "update"):
        return "; summarize(model, optimizer=optimizer) reads updates and the optimizer's state"
    if stat in DISTRIBUTION_STATS:
        return f"; {READ_DISTRIBUTION}"
    if stat == "min_update_ratio":
        return "; stat='update_ratio' draws the exact ratio, where it is known"
    return "; kind='param' draws the tensors themselves" if kind == "grad" else ""
