"""States of tensors as columns of a JSON object, and the checks of parsed values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import starmap
from typing import Any

from paramstats._core.moments import INF, NAN, ROW, Moments, finite_count

Check = Callable[[Moments], bool]
"""Returns whether some tensor has this state."""

COUNTS = Moments._fields[1:5]
"""The columns that are zeros by default: counts of some elements."""

_FLOATS = Moments._fields[5:]

_STRING_OR_WORD = re.compile(r'"(?:[^"\\]+|\\.)*"|NaN|Infinity')
_JSON_WORDS = {"NaN": "null", "Infinity": "1e999"}


def json_text(content: Mapping[str, Any]) -> str:
    """Return an object as JSON, with `null` for NaN and `1e999` for infinity."""
    text = json.dumps(content, separators=(",", ":"))
    if "NaN" in text or "Infinity" in text:  # replace them, but not within strings
        text = _STRING_OR_WORD.sub(lambda match: _JSON_WORDS.get(match[0], match[0]), text)
    return text


def to_columns(
    rows: Sequence[tuple[Any, ...]], counts: list[int], zeros: Sequence[str] = COUNTS
) -> dict[str, tuple[Any, ...]]:
    """Return states by column, without columns that equal their default.

    Args:
        rows: the states.
        counts: the default of the counts.
        zeros: the columns whose default is zeros.
    """
    columns = dict(zip(Moments._fields, zip(*rows, strict=True), strict=False))
    defaults = {"count": counts, **{name: [0] * len(rows) for name in zeros}}
    return {name: column for name, column in columns.items() if list(column) != defaults.get(name)}


def from_columns(
    columns: Mapping[str, list[Any]],
    counts: list[int],
    min_count: int,
    checks: Sequence[Check],
    zeros: Sequence[str] = COUNTS,
) -> list[Moments]:
    """Return the states of the rows.

    Args:
        columns, counts, zeros: as in `to_columns`.
        min_count: the smallest count that is allowed.
        checks: one for each row.

    Raises:
        ValueError: no tensor can have such a state.
    """
    default = dict.fromkeys(zeros, [0] * len(counts))
    whole = [columns.get("count", counts), *(columns.get(name, default[name]) for name in COUNTS)]
    floats = [
        [NAN if x is None else x for x in columns.get(name, default.get(name, []))]
        for name in _FLOATS
    ]
    rows = list(zip(*whole, *floats, strict=True))
    expect(len(rows) == len(counts), f"{len(counts)} values in each column", len(rows))
    packed = b"".join(starmap(ROW.pack, rows))  # raises an error for values of other types
    states = list(map(Moments._make, ROW.iter_unpack(packed)))
    for state, is_possible in zip(states, checks, strict=True):
        expect(state.count >= min_count, f"a count >= {min_count}", state)
        expect(is_possible(state), "a tensor's state", state)
    total = sum(state.count for state in states)
    expect(total < 1 << 63, "counts with a sum below 2^63", total)
    return states


def is_real_state(a: Moments) -> bool:
    """Return whether some real tensor has this state, up to rounding errors."""
    if not _has_counts(a):
        return False
    if math.isnan(a.mean):
        return sum(a[1:5]) == 0 and all(map(math.isnan, a[6:]))
    n = finite_count(a)
    if n <= 0:
        return _is_empty(a)
    # n elements between min and max have m2 <= n ((max - min) / 2)^2 (Popoviciu 1935).
    radius = (a.max - a.min) / 2 + _rounding(a.min, a.max)
    return (
        -INF < a.min <= a.max < INF
        and is_between(a.min, a.mean, a.max)
        and a.m2 <= n * radius * radius * 1.001 + 1e-290
        and (a.zeros == 0 or a.min <= 0 <= a.max)
    )


def is_between(low: float, mean: float, high: float) -> bool:
    """Return whether elements between `low` and `high` have this mean, up to rounding errors."""
    rounding = _rounding(low, high)
    return low - rounding <= mean <= high + rounding


def _rounding(low: float, high: float) -> float:
    return 1e-6 * max(abs(low), abs(high))


def is_complex_state(a: Moments) -> bool:
    """Return whether some complex tensor has this state.

    The mean and m2 of elements near the limit of float64 may be infinite or NaN.
    """
    if not _has_counts(a):
        return False
    if math.isnan(a.mean):
        return True
    return not a.min > a.max if finite_count(a) > 0 else _is_empty(a)


def _has_counts(a: Moments) -> bool:
    parts = a[1:5]
    return min(parts) >= 0 and sum(parts) <= max(a.count, 0) and not a.m2 < 0


def _is_empty(a: Moments) -> bool:
    """Return whether a state without finite elements is that of such a tensor."""
    return a.count >= 0 and a[5:] == (0, 0, INF, -INF)


def expect(condition: bool, what: str, got: object) -> None:
    """Raise ValueError unless `condition` holds; `assert` would not run under `python -O`."""
    if not condition:
        raise ValueError(f"expected {what}, got {repr(got)[:80]}")


def list_of(kind: type, values: Any, what: str, length: int | None = None) -> list[Any]:
    """Return a parsed list; raises ValueError unless its items are of a type."""
    expect(type(values) is list and length in (None, len(values)), f"a list for {what}", values)
    expect(kind is object or set(map(type, values)) <= {kind}, f"{kind.__name__}s, {what}", values)
    return list(values)


def to_number(value: Any, what: str) -> float:
    """Return a parsed finite number; raises ValueError for anything else."""
    expect(type(value) in (int, float) and math.isfinite(value), f"a number for {what}", value)
    return float(value)
