"""Check the arguments of `History.plot` and `History.heatmap`, and choose the tensors to draw."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from paramstats._core.derived import DERIVED
from paramstats._core.layout import Layout
from paramstats._core.options import DISTRIBUTION_STATS, STATS, Pattern, did_you_mean

Names = Pattern | Iterable[Pattern]
_NAMES = "names, or regular expressions that match some"


def check_plot(function: str, stat: str, kind: str, known: Iterable[str]) -> None:
    """Raise ValueError if `stat` or `kind` is unknown; `known` are kinds that the history has."""
    stats = (*STATS, *DISTRIBUTION_STATS, *DERIVED, "min_update_ratio")
    if stat not in stats:
        raise ValueError(
            f"{function}: expected stat to be one of {', '.join(stats)}, got {stat!r}"
            f"{did_you_mean(stat)}"
        )
    kinds = dict.fromkeys(("grad", "param", "update", *known))
    if kind not in kinds:
        *most, last = map(repr, kinds)
        raise ValueError(f"{function}: expected {', '.join(most)} or {last} for kind, got {kind!r}")


def choose(function: str, names: Names | None, layouts: Sequence[Layout]) -> list[str]:
    """Return the first names of the tensors that `names` select, in the model's order.

    Args:
        function: the name of the called function, for errors.
        names: names, aliases or regular expressions; "total", which comes last; None: all names.
        layouts: the history's layouts, in order of appearance. The latest decides which name of a
            tensor is the first.
    """
    known = list(dict.fromkeys(name for layout in layouts for name in layout.names))
    if names is None:
        return known
    chosen: set[str] = set()
    patterns = [names] if isinstance(names, (str, re.Pattern)) else names
    for pattern in patterns if isinstance(patterns, Iterable) else [patterns]:
        if not isinstance(pattern, (str, re.Pattern)):
            raise TypeError(f"{function}: expected {_NAMES}, got {pattern!r}")
        matching = _matching(pattern, layouts, known)
        if not matching:
            raise ValueError(
                f"{function}: expected {_NAMES}, got {pattern!r}, which matches none of "
                f"{len(known)} names"
            )
        chosen |= matching
    return [name for name in dict.fromkeys((*known, "total")) if name in chosen]


def _matching(pattern: Pattern, layouts: Sequence[Layout], known: Sequence[str]) -> set[str]:
    """Return the name that `pattern` is, or else the names that it is found in."""
    for layout in reversed(layouts):
        row = layout.index.get(str(pattern))
        if row is not None:
            return {layout.names[row]}
    if pattern == "total":
        return {"total"}
    try:
        return {name for name in known if re.search(pattern, name)}
    except re.error:
        return set()
