"""Write the notes about what a file has besides tensors."""

from __future__ import annotations

from collections.abc import Sequence

from paramstats._core.format import one_line_name

_SHOWN = 3
"""Values that a note names."""

_MAX_SHOWN_LENGTH = 100


def not_tensors(noun: str, values: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Return a note about values that were not read, given their classes and names.

    Either may be empty. There is no note about no values.
    """
    if not values:
        return ()
    what = f"{noun}s that are not tensors" if len(values) > 1 else f"{noun} that is not a tensor"
    shown = [
        " at ".join(part for part in (shorten(kind), f"'{shorten(name)}'" if name else "") if part)
        for kind, name in values[:_SHOWN]
    ]
    more = [f"and {len(values) - _SHOWN:,} more"] if len(values) > _SHOWN else []
    return (f"not read: {len(values):,} {what} ({', '.join(shown + more)})",)


def shorten(text: str) -> str:
    """Return a text from a file so that it may be shown."""
    short = text if len(text) <= _MAX_SHOWN_LENGTH else f"{text[:_MAX_SHOWN_LENGTH]}..."
    return one_line_name(short)
