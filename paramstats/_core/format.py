"""Format numbers, names, shapes and dtypes for display."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def number(x: float) -> str:
    """Format a number with four significant digits, as torch does.

    Magnitudes below 1e-3 and from 1e4 have an exponent.

    >>> from paramstats._core.format import number
    >>> number(0.25), number(-1.7468e-4), number(65504)
    ('0.25', '-1.747e-04', '6.550e+04')
    """
    # Outside these limits, four digits round to less than 1e-3, or to 1e4 or more.
    return f"{x:.4g}" if 0.00099995 <= abs(x) < 9999.5 or x == 0 else f"{x:.3e}"


def percent(fraction: float) -> str:
    """Format a fraction as a percentage; 0 % and 100 % stand for exactly none and all.

    >>> from paramstats._core.format import percent
    >>> percent(0.125), percent(1e-9), percent(1 - 1e-9)
    ('12.5%', '<0.1%', '>99.9%')
    """
    if fraction == 0:
        return "0%"
    if math.isnan(fraction):
        return "nan"
    text = f"{100 * fraction:.1f}"
    if fraction > 0 and text == "0.0":
        return "<0.1%"
    if fraction < 1 and text == "100.0":
        return ">99.9%"
    return f"{text.removesuffix('.0')}%"


def bars(counts: Sequence[int], width: int) -> str:
    """Return counts as one line of at most `width` bars; several counts may share a bar."""
    if not any(counts):
        return ""
    step = -(-len(counts) // max(width, 1))
    sums = [sum(counts[i : i + step]) for i in range(0, len(counts), step)]
    levels, most = printable(" ▁▂▃▄▅▆▇█", " .:-=+*#@"), max(sums)
    return "".join(levels[-(-count * (len(levels) - 1) // most)] for count in sums)


def elide(text: str, width: int) -> str:
    """Shorten a name to `width` characters by leaving out its middle.

    The end keeps more characters than the start, because names of layers differ at the end.
    """
    if len(text) <= width:
        return text
    mark = printable("…", "~")
    head = (width - len(mark)) // 3
    return text[:head] + mark + text[len(text) - (width - len(mark) - head) :]


def columns(width: int | None) -> int:
    """Return `width` or, if it is None, the width of the terminal; unlimited without one."""
    if width is not None:
        return width
    if "COLUMNS" in os.environ or on_terminal():
        return shutil.get_terminal_size().columns
    return 1 << 30


def on_terminal() -> bool:
    """Return whether standard output is a terminal. Objects that replace it may lack `isatty`."""
    isatty = getattr(sys.stdout, "isatty", None)
    return isatty is not None and bool(isatty())


def printable(text: str, replacement: str) -> str:
    """Return `text` if standard output can encode it, else `replacement`."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return replacement
    return text


def one_line_name(name: str) -> str:
    r"""Return a name or another text from outside as it may be shown: printable, on one line.

    Escapes what `repr` escapes: control and format characters, bidirectional controls included,
    line separators and lone surrogates. Also escapes what standard output cannot encode.

    >>> from paramstats._core.format import one_line_name
    >>> print(one_line_name("layer\x1b[31m.weight"))
    layer\x1b[31m.weight
    """
    text = name if str.isprintable(name) else str.__repr__(name)[1:-1]
    return printable(text, text.encode("ascii", "backslashreplace").decode())


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def shape(sizes: tuple[int, ...] | None) -> str:
    """Format a shape; None is that of a lazy parameter."""
    return "lazy" if sizes is None else f"[{', '.join(map(str, sizes))}]"
