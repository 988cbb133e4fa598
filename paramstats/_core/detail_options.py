"""Which tensors' distributions and rows a call reads: the arguments `distribution` and `rows`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from paramstats._core.details import READ_DISTRIBUTION, READ_ROWS
from paramstats._core.layout import Layout
from paramstats._core.names import Patterns, compile_patterns

Selection = bool | str | re.Pattern[str] | Iterable[str | re.Pattern[str]] | None
"""True for all tensors, False or None for none, or regular expressions for some."""

NO_TENSOR: Patterns = ()


class DetailOptions(NamedTuple):
    """Checked arguments: the patterns of names; None for all tensors, () for none."""

    distribution: Patterns | None = NO_TENSOR
    rows: Patterns | None = NO_TENSOR

    def arguments(self) -> dict[str, Any]:
        """Return `distribution` and `rows` as `summarize` takes them, for several calls."""
        return {
            argument: True if patterns is None else patterns or False
            for argument, patterns in self._asdict().items()
        }

    def flags(self, layout: Layout) -> bytes:
        """Return one byte for each tensor, as a backend's `read` expects it in `details`."""
        out = bytearray(len(layout))
        for bit, patterns in ((READ_DISTRIBUTION, self.distribution), (READ_ROWS, self.rows)):
            for row in layout.select(patterns, ())[1]:
                out[row] |= bit
        return bytes(out) if any(out) else b""

    def warn_no_match(self, layout: Layout, stacklevel: int) -> None:
        """Warn about arguments whose patterns select no tensor."""
        for argument, patterns in self._asdict().items():
            if patterns and not layout.select(patterns, ())[1]:
                warnings.warn(
                    f"paramstats.summarize: no name matches {argument}=",
                    RuntimeWarning,
                    stacklevel=stacklevel + 1,
                )


def make_detail_options(distribution: Selection, rows: Selection) -> DetailOptions | None:
    """Return the checked arguments, or None if nothing is asked for."""
    options = DetailOptions(_checked(distribution, "distribution"), _checked(rows, "rows"))
    return None if options == DetailOptions() else options


def _checked(selection: Any, argument: str) -> Patterns | None:
    """Return patterns. Raises TypeError or re.error for what is neither a bool nor patterns."""
    if selection is True:
        return None
    if selection is False or selection is None:
        return NO_TENSOR
    return compile_patterns(selection, argument)
