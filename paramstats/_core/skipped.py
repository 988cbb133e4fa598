"""Warnings of tensors that could not be read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

_warned: set[tuple[str, str]] = set()
_MOST_WARNED = 1000
"""Kinds remembered: a reason may have a size in it that is new at every call."""


def warn_once(skipped: Mapping[str, str], types: Mapping[str, type]) -> None:
    """A warning for each kind of tensor and reason that it could not be read, once in a process."""
    for name, reason in skipped.items():
        cls = types.get(name, type(None))
        kind = (f"{cls.__module__}.{cls.__qualname__}", reason)  # not the class, which would stay
        if kind not in _warned:
            if len(_warned) >= _MOST_WARNED:
                return
            _warned.add(kind)
            warnings.warn(
                f"paramstats.summarize: '{name}' could not be read, its statistics are NaN: {reason}",
                RuntimeWarning,
                stacklevel=4,
            )
