"""Numbers, names and single tensors as people read them; tables are in report/."""

from __future__ import annotations

import math
import os
import shutil
import sys
from typing import TYPE_CHECKING

from paramstats._core.moments import is_unread

if TYPE_CHECKING:
    import torch

    from paramstats._stats import ParamStats, TensorStats


def one_line(stats: TensorStats) -> str:
    """What a tensor is like, in one line."""
    grad = getattr(stats, "grad", None)
    entry: ParamStats | None = stats if hasattr(stats, "name") else None  # type: ignore[assignment]
    parts = [] if entry is None else [_what(entry)]
    parts.append(_values(stats))
    if grad is not None:
        parts.append(f"grad({one_line(grad)})")
    return " ".join(parts)


def _what(entry: ParamStats) -> str:
    dtype = dtype_name(entry.dtype)
    device = "" if entry.device.type == "cpu" else f" {entry.device}"
    count = f" n={entry.count:,}" if entry.shape is not None and len(entry.shape) > 1 else ""
    return f"{one_line_name(entry.name)}: {dtype} {shape(entry.shape)}{count}{device}"


def _values(stats: TensorStats) -> str:
    """The statistics, or in a word what they would say one by one."""
    if is_unread(stats._state):
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
        parts.append(f"zeros={percent(stats.zero_fraction)}")
    for name, count in (
        ("NaN", stats.nan_count),
        ("+Inf", stats.pos_inf_count),
        ("-Inf", stats.neg_inf_count),
    ):
        if count:
            parts.append(f"{name}!={count:,}")
    return " ".join(parts)


def number(x: float) -> str:
    """Four significant digits; far from 1 in engineering notation, exponents in steps of three."""
    mantissa, _, exponent = f"{x:.3e}".partition("e")
    if x == 0 or not exponent or -3 <= int(exponent) <= 3:
        return f"{x:.4g}"
    shift = int(exponent) % 3
    return f"{float(mantissa) * 10**shift:.{3 - shift}f}e{int(exponent) - shift}"


def percent(fraction: float) -> str:
    """A share as a percentage that says 0 % and 100 % only where that is exact."""
    if math.isnan(fraction):
        return "nan"
    text = f"{100 * fraction:.1f}"
    if fraction > 0 and text == "0.0":
        return "<0.1%"
    if fraction < 1 and text == "100.0":
        return ">99.9%"
    return f"{text.removesuffix('.0')}%"


def elide(text: str, width: int) -> str:
    """`text` with its middle left out, the end kept longer: that is where layers differ."""
    if len(text) <= width:
        return text
    mark = printable("…", "~")
    head = (width - len(mark)) // 3
    return text[:head] + mark + text[len(text) - (width - len(mark) - head) :]


def columns(width: int | None) -> int:
    """How wide a table may be: `width`, or the terminal's; without one there is no limit."""
    if width is not None:
        return width
    if "COLUMNS" in os.environ or on_terminal():
        return shutil.get_terminal_size().columns
    return 1 << 30


def on_terminal() -> bool:
    """Whether standard output is one; what stands in for it need not know."""
    isatty = getattr(sys.stdout, "isatty", None)
    return isatty is not None and bool(isatty())


def printable(text: str, plain: str) -> str:
    """`text` where standard output can hold it: a table must not stop a run with an error."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return plain
    return text


def one_line_name(name: str) -> str:
    """A name as it can be printed: without line ends, escapes, or what standard output lacks."""
    text = name if name.isprintable() else repr(name)[1:-1]
    return printable(text, text.encode("ascii", "backslashreplace").decode())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape(sizes: tuple[int, ...] | None) -> str:
    return "lazy" if sizes is None else f"[{', '.join(map(str, sizes))}]"
