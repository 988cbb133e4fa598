"""Format numbers, names, shapes and dtypes for people."""

from __future__ import annotations

import math
import os
import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def number(x: float) -> str:
    """Format with four significant digits; from 1e4 on and below 1e-3 with an exponent.

    >>> from paramstats._core.format import number
    >>> number(0.25), number(-1.7468e-4), number(65504)
    ('0.25', '-1.747e-04', '6.550e+04')
    """
    text = f"{x:.3e}"
    _, _, exponent = text.partition("e")
    return f"{x:.4g}" if x == 0 or not exponent or -3 <= int(exponent) <= 3 else text


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
