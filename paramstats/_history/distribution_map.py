"""Draw how the elements of one tensor are distributed over binary exponents, over steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from paramstats._core.format import elide, one_line_name
from paramstats._core.names import no_such_name
from paramstats._histogram import Histogram
from paramstats._history import axes, mesh
from paramstats._history.drawing import READ_DISTRIBUTION
from paramstats._history.json_lines import Entry
from paramstats._history.tensor_series import Array
from paramstats._summary import layout_of, record_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KINDS = ("param", "grad")

_INCHES = 3.6
"""Height of a new figure."""

_MAX_NAME_LENGTH = 24
"""Leaves space for the legend next to the title."""

_LEAST, _MAX_LEAST = 1e-6, 0.1
"""Limits for the lower end of the color scale; the upper one is all elements."""

_GAP, _HEIGHT = 0.04, 0.07
"""Distance and height of the rows of zeros and of NaN and Inf, relative to the rows of all bins."""


def draw_distribution(
    function: str, entries: Sequence[Entry], name: str, kind: str, ax: Axes | None
) -> Figure:
    """Draw a row per binary exponent and a column per entry; see `History.distribution`.

    From the bottom: a row for zeros, a gap, the rows of the bins, a gap, a row for NaN and Inf. The
    last two are left out if all elements are finite.

    `function` is the name of the called function, for errors.
    """
    histograms = _histograms(function, entries, name, kind)
    scales = [record_of(entry.summary).grad_scale if kind == "grad" else 1.0 for entry in entries]
    # The bin of exponent e begins at 2^e / scale = 2^(e - shift - offset).
    scale = np.log2(scales)
    offset = float(scale[0] % 1)
    shifts = np.rint(scale - offset)
    low, shares = _shares(histograms, shifts.astype(np.int64).tolist())
    is_nonfinite = np.zeros(shares.shape, bool)
    is_nonfinite[-1] = [one is not None and _nonfinite_count(one) > 0 for one in histograms]
    steps = np.array([entry.step for entry in entries], dtype=np.int64)
    shares, is_nonfinite, edges = mesh.joined(shares, is_nonfinite, mesh.column_edges(steps))

    bins = len(shares) - 4
    span = max(bins, 1)
    ends = [*np.arange(low, low + bins + 1), low + bins + _GAP * span]
    rows = np.array([low - (_GAP + _HEIGHT) * span, low - _GAP * span, *ends]) - offset
    rows = np.append(rows, rows[-1] + _HEIGHT * span)
    codes = (mesh.NONFINITE, mesh.MISSING, mesh.ZERO)
    special = np.select([is_nonfinite, np.isnan(shares), shares == 0], codes, mesh.ORDINARY)
    special[[1, -2]] = mesh.ORDINARY  # gaps, whose shares are NaN
    ax = ax or axes.new_axes(0, _INCHES)
    if is_nonfinite.any():
        mesh.mark_columns(ax, edges, is_nonfinite)
    else:
        rows, shares, special = rows[:-2], shares[:-2], special[:-2]
    least = np.min(shares, where=shares > 0, initial=_MAX_LEAST)
    norm, extend = LogNorm(max(least, _LEAST), 1), "min" if least < _LEAST else "neither"
    cells = mesh.draw_cells(ax, edges, rows, shares, special, norm)
    ax.set_ylim(rows[0], rows[-1])
    mesh.add_colorbar(ax, cells, extend).set_label("share of elements", fontsize=axes.SMALL)
    meanings = {mesh.MISSING: "not known", mesh.ZERO: "no elements", mesh.NONFINITE: "NaN or Inf"}
    mesh.add_meanings(ax, special, meanings)
    axes.format_axes(ax, edges[0], edges[-1])
    is_exact = np.allclose(scale, shifts + offset)
    note = "" if is_exact else ", within a factor of 1.42"
    ax.set_ylabel(f"magnitude{note}", fontsize=axes.SMALL)
    title = f"{axes.title('distribution', kind)} of {elide(one_line_name(name), _MAX_NAME_LENGTH)}"
    ax.set_title(title, loc="left", parse_math=False)
    _label_rows(ax, rows, bins)
    return axes.figure_of(ax)


def _histograms(
    function: str, entries: Sequence[Entry], name: str, kind: str
) -> list[Histogram | None]:
    """Return the histogram at each entry; None where there is none. Checks the arguments."""
    if kind not in _KINDS:
        raise ValueError(f"{function}: expected 'param' or 'grad' for kind, got {kind!r}")
    if not entries:
        raise ValueError(f"{function}: expected entries, got an empty history")
    layouts = list(dict.fromkeys(layout_of(entry.summary) for entry in entries))
    is_known = any(name in layout.index for layout in layouts)
    if not is_known and name != "total":
        known = dict.fromkeys(known for layout in layouts for known in layout.index)
        first_names = {name for layout in layouts for name in layout.names}
        raise KeyError(no_such_name(name, known, len(first_names)))
    summaries = [entry.summary for entry in entries]
    stats: list[Any] = [one.get(name) if is_known else one.total for one in summaries]
    if kind == "grad":
        stats = [None if one is None else one.grad for one in stats]
    histograms = [None if one is None else one.histogram for one in stats]
    if not any(one is not None and one.count for one in histograms):
        raise ValueError(
            f"{function}: expected distributions of {name!r}, got none at any step; "
            f"{READ_DISTRIBUTION}"
        )
    return histograms


def _shares(histograms: Sequence[Histogram | None], shifts: Sequence[int]) -> tuple[int, Array]:
    """Return the lowest exponent, and the shares of all elements of shape (rows, entries).

    The rows are those of `draw_distribution`; gaps are NaN, and NaN and Inf are 0. Entries without
    a distribution are NaN.
    """
    known = [
        (column, one, one.exponents.start - shift)
        for column, (one, shift) in enumerate(zip(histograms, shifts, strict=True))
        if one is not None and one.count
    ]
    filled = [(first, first + len(one.exponents)) for _, one, first in known if one.exponents]
    low = min((first for first, _ in filled), default=0)
    bins = max((end for _, end in filled), default=0) - low
    shares = np.full((bins + 4, len(histograms)), np.nan)
    for column, one, first in known:
        begin = 2 + first - low
        shares[[0, -1], column] = one.zero_count / one.count, 0.0
        shares[2:-2, column] = 0.0
        if one.exponents:
            shares[begin : begin + len(one.exponents), column] = (
                np.array(one.magnitudes) / one.count
            )
    return low, shares


def _nonfinite_count(one: Histogram) -> int:
    return one.nan_count + one.pos_inf_count + one.neg_inf_count


def _label_rows(ax: Axes, rows: Array, bins: int) -> None:
    """Label the row of zeros, powers of two, and the row of NaN and Inf if there is one."""
    low, high = rows[2], rows[2 + bins]
    powers = MaxNLocator(8, integer=True).tick_values(low, high) if bins else []
    ticks = [((rows[0] + rows[1]) / 2, "0")]
    ticks += [(y, f"$2^{{{y:.0f}}}$") for y in powers if low <= y <= high]
    if len(rows) > 3 + bins:
        ticks.append(((rows[-2] + rows[-1]) / 2, "NaN, Inf"))
    ax.set_yticks([y for y, _ in ticks], [label for _, label in ticks])
