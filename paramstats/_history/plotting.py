"""Lines over steps: a history's statistics as a person looks at them; heatmap.py has many at once.

Imported by `History.plot` alone: `import paramstats` needs no matplotlib. Statistics are made without
pyplot, which would keep them, choose a window system and change what the caller has set.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from paramstats._core.options import STATS
from paramstats._history.labels import LINE_HEIGHT, SMALL, label_ends, root
from paramstats._history.series import Array, ParamSeries, TotalSeries
from paramstats._summary import layout_of

if TYPE_CHECKING:
    from paramstats._history import History

WIDTH = 9.0
"""Inches: 900 pixels at matplotlib's usual resolution, as wide as a README."""

BAD = "#d55e00"
"""Vermilion: of NaN and infinities. Neither viridis nor the colours of lines come near it, for any
kind of colour vision."""

_FEW = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#616e7c"),  # Okabe and Ito's, grey
    *("#332288", "#999933", "#882255", "#44aa99"),  # Tol's
)
"""More lines than these take viridis, in the model's order."""

_ON_LIGHT, _ON_DARK = (0.0, 0.8), (0.35, 1.0)
"""The parts of viridis in which text can be read."""

_TITLES = {
    "norm": "L2 norm",
    "rms": "root mean square",
    "std": "standard deviation",
    "var": "variance",
    "abs_max": "maximum magnitude",
    "min": "minimum",
    "max": "maximum",
    "count": "element count",
    "zero_fraction": "zero fraction",
    "zero_count": "zero count",
    "nan_count": "NaN count",
    "pos_inf_count": "+Inf count",
    "neg_inf_count": "-Inf count",
    "nonfinite_count": "NaN and Inf count",
    "min_update_ratio": "least relative change between entries",
}
_SIZES = {"norm", "rms", "std", "var", "abs_max", "min_update_ratio"}
"""Statistics whose orders of magnitude matter."""

_WIDE_RANGE = 20
"""Largest over smallest, from where on an axis is logarithmic."""


class Picture(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png")
        return out.getvalue()


def lines(history: History, names: Sequence[str], stat: str, kind: str, ax: Axes | None) -> Figure:
    """A line for each name, labelled at its end; NaN and infinities marked on the steps' axis."""
    steps = history.steps
    ax = ax or new_axes(float(np.clip(0.9 + LINE_HEIGHT * len(names), 3.2, 8.5)))
    bad = np.zeros(len(steps), dtype=bool)
    drawn: list[tuple[str, Line2D]] = []
    for name, colour in zip(names, _colours(ax, len(names)), strict=True):
        series = history.total if name == "total" and name not in history else history[name]
        own = series if kind == "param" else series.grad
        values = values_of(series, stat, kind)
        bad |= own.nonfinite_count > 0
        values = np.where(np.isfinite(values), values, np.nan)
        (line,) = ax.plot(steps, values, color=colour, linewidth=1.3, label=name)
        if len(steps) < 30:
            line.set_marker(".")
        if not np.isnan(values).all():
            drawn.append((name, line))
    if not drawn and not bad.any():
        raise nothing(kind)
    _scale(ax, stat, [np.asarray(line.get_ydata()) for _, line in drawn])
    if bad.any():
        (mark,) = ax.plot(
            steps[bad],
            np.full(bad.sum(), 0.02),
            transform=ax.get_xaxis_transform(),
            linestyle="",
            marker="x",
            color=BAD,
            label="NaN or Inf",
        )
        legend(ax, [mark])
    finish(ax, steps.tolist())
    labelled = label_ends(ax, drawn)
    some = "" if labelled == len(drawn) else f" ({labelled} of {len(drawn)} labelled)"
    ax.set_title(title(stat, kind) + some, loc="left")
    return root(ax)


def chosen(
    history: History, names: str | re.Pattern[str] | Iterable[str | re.Pattern[str]]
) -> list[str]:
    """The names that `names` stand for, in the model's order, the total last."""
    several = [names] if isinstance(names, (str, re.Pattern)) else names
    if not isinstance(several, Iterable):
        raise _no_names(names)
    known = history.names
    # By what they were called when they were last there, without statistics of every entry.
    layouts = dict.fromkeys(layout_of(summary) for _, summary in reversed(list(history)))
    found: set[str] = set()
    for name in several:
        if not isinstance(name, (str, re.Pattern)):
            raise _no_names(name)
        rows = ((layout, layout.index.get(cast(str, name))) for layout in layouts)
        first = next((layout.names[row] for layout, row in rows if row is not None), None)
        if first is not None:
            found.add(first)
            continue
        if name == "total":
            found.add("total")
            continue
        try:
            matching = {other for other in known if re.search(name, other)}
        except re.error:
            matching = set()
        if not matching:
            raise ValueError(
                f"paramstats.History.plot: expected names, or regular expressions found in some, "
                f"got {name!r}, which is in none of {len(known)}"
            )
        found |= matching
    return [name for name in (*known, "total") if name in found]


def _no_names(got: object) -> TypeError:
    return TypeError(
        f"paramstats.History.plot: expected names, or regular expressions found in some, "
        f"got {got!r}"
    )


def check(history: History, stat: str, kind: str) -> None:
    if not len(history):
        raise ValueError("paramstats.History.plot: expected entries, got an empty history")
    if stat not in STATS and stat != "min_update_ratio":
        raise ValueError(
            f"paramstats.History.plot: expected a stat out of {', '.join(STATS)}, min_update_ratio, "
            f"got {stat!r}"
        )
    if kind not in ("grad", "param"):
        raise ValueError(
            f"paramstats.History.plot: expected 'grad' or 'param' for kind, got {kind!r}"
        )


def values_of(series: TotalSeries, stat: str, kind: str) -> Array:
    if stat == "min_update_ratio":
        if isinstance(series, ParamSeries):
            return series.min_update_ratio
        raise ValueError(
            "paramstats.History.plot: expected names for min_update_ratio, got 'total'"
        )
    return cast(Array, getattr(series if kind == "param" else series.grad, stat))


def nothing(kind: str) -> ValueError:
    """What is raised where there is no figure at all."""
    what, more = (
        ("gradients", "; kind='param' draws the tensors' own")
        if kind == "grad"
        else ("statistics", "")
    )
    return ValueError(f"paramstats.History.plot: expected {what}, got none at any step{more}")


def title(stat: str, kind: str) -> str:
    if stat == "min_update_ratio":
        return _TITLES[stat]
    return f"{'gradient' if kind == 'grad' else 'parameter'} {_TITLES.get(stat, stat)}"


def is_a_size(stat: str) -> bool:
    """Whether it belongs on a logarithmic scale."""
    return stat in _SIZES


def new_axes(height: float) -> Axes:
    return Picture(figsize=(WIDTH, height), layout="constrained").add_subplot()


def legend(ax: Axes, handles: Sequence[object]) -> None:
    """Above the data, at the right."""
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


def finish(ax: Axes, steps: list[int]) -> None:
    ax.set_xlabel("step", fontsize=SMALL)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.tick_params(labelsize=SMALL)
    ax.spines[["top", "right"]].set_visible(False)
    if len(steps) > 1:
        ax.set_xlim(steps[0], steps[-1])


def _scale(ax: Axes, stat: str, values: list[Array]) -> None:
    """Logarithmic where orders of magnitude are drawn; zeros are then off the picture."""
    every = np.concatenate([np.empty(0), *values])
    positive = every[every > 0]
    if is_a_size(stat) and positive.size and positive.max() > _WIDE_RANGE * positive.min():
        ax.set_yscale("log")


def _colours(ax: Axes, count: int) -> list[object]:
    if count <= len(_FEW):
        return list(_FEW[:count])
    is_dark = np.mean(to_rgb(ax.get_facecolor())) < 0.5
    return list(colormaps["viridis"](np.linspace(*(_ON_DARK if is_dark else _ON_LIGHT), count)))
