"""The statistics of one tensor as text: one line, and a line for each thing read in addition."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from paramstats._core.format import columns, number, percent

if TYPE_CHECKING:
    from paramstats._tensor_stats import TensorStats

_WIDTH = 100
"""Maximum width of a line of details."""


def values(stats: TensorStats) -> str:
    """Return the statistics as one line; shorter if all elements are equal."""
    if not stats.is_read():
        return "no statistics yet"
    if not stats.count:
        return "empty"
    if stats.zero_fraction == 1:
        return "all zeros"
    if stats.count > 1 and stats.min == stats.max and not stats.nonfinite_count:
        return f"all {number(stats.mean)}"
    parts = [
        f"{stat}={number(getattr(stats, stat))}" for stat in ("mean", "std", "norm", "min", "max")
    ]
    if stats.zero_count:
        parts.append(f"zero_fraction={percent(stats.zero_fraction)}")
    counts = {"NaN": stats.nan_count, "+Inf": stats.pos_inf_count, "-Inf": stats.neg_inf_count}
    parts += [f"{what}!={count:,}" for what, count in counts.items() if count]
    return " ".join(parts)


def details(stats: TensorStats, of: str = "") -> Iterator[str]:
    """Yield a line for each of the histogram, the zero rows and the rows, if there are some.

    Args:
        of: what stands in front of each line, such as "grad ".
    """
    if not stats.count or stats.zero_count == stats.count:
        return
    width = min(columns(None), _WIDTH)
    if stats.histogram is not None:
        label = f"  {of}histogram: "
        yield label + stats.histogram.line(width - len(label))
    if stats.zero_rows:
        label = f"  {of}zero rows: {len(stats.zero_rows):,} (index "
        yield f"{label}{ranges(stats.zero_rows, width - len(label) - 1)})"
    if stats.rows is not None:
        yield f"  {of}rows: {stats.rows}"


def ranges(indices: Sequence[int], width: int) -> str:
    """Return ascending indices as text; those that do not fit in `width` are left out.

    >>> from paramstats._display.one_tensor import ranges
    >>> ranges([0, 1, 2, 5, 8, 9], 20), ranges([0, 1, 2, 5, 8, 9], 10)
    ('0-2, 5, 8-9', '0-2, ...')
    """
    text = ""
    for _, run in itertools.groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        first, *others = (index for _, index in run)
        last = others[-1] if others else first
        part = f"{first}-{last}" if others else f"{first}"
        is_last = last == indices[-1]
        if text and len(text) + len(part) + (2 if is_last else 7) > width:
            return f"{text}, ..."
        text += f", {part}" if text else part
    return text
