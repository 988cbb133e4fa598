"""A summary as people read it: an aligned table, HTML for notebooks, one line for one tensor."""

from __future__ import annotations

import html as markup
import math
import os
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paramstats.stats import ParamStats, TensorStats
    from paramstats.summary import Summary

_HEADINGS = ("parameter", "shape", "mean", "std", "norm", "zeros")
_GRAD_HEADINGS = ("grad mean", "grad std", "grad norm", "grad zeros")
_LEFT_OUT = ("grad mean", "mean", "grad zeros", "zeros", "grad std", "std", "shape")
"""In this order, where a terminal is too narrow for all columns."""

_GAP = "  "
_WHOLE_NAME = 48
"""Names up to this long are kept whole at the cost of columns; 80 columns have room for norms."""

_NARROWEST_NAME = 12
_UNLIMITED = 1 << 30
_ALIAS = "  = "


def table(summary: Summary, width: int | None = None) -> str:
    """Names left, figures right, the total under a line; long names elided in the middle.

    The other names of a tied parameter stand in lines of their own under it.
    """
    if width is None:
        width = shutil.get_terminal_size().columns if _on_a_terminal() else _UNLIMITED
    columns = [list(column) for column in zip(*_cells(summary), strict=True)]
    for heading in _LEFT_OUT:
        if _width(columns[1:]) + min(_longest(columns[0]), _WHOLE_NAME) <= width:
            break
        columns = [column for column in columns if column[0] != heading]
    widths = [_longest(column) for column in columns]
    widths[0] = min(widths[0], max(width - _width(columns[1:]), _NARROWEST_NAME))
    head, *body, total = (_line(line, widths) for line in zip(*columns, strict=True))
    rule = _printable("─", "-") * len(head)
    return "\n".join([head, rule, *body, rule, total, *_notes(summary)])


def html(summary: Summary) -> str:
    """The same as an HTML table."""
    head, *body = _cells(summary)
    notes = "".join(f"<p>{markup.escape(note)}</p>" for note in _notes(summary))
    return (
        f"<table>{_html_row('th', head)}{''.join(_html_row('td', line) for line in body)}</table>"
        f"{notes}"
    )


def _notes(summary: Summary) -> list[str]:
    """What a reader of a sharded model's figures must know."""
    notes = []
    if summary.is_local:
        notes.append("figures of this process's part alone")
    if summary.diverged:
        first, *others = summary.diverged
        more = f" (and {len(others)} more)" if others else ""
        notes.append(f"copies differ: {first}{more}: {summary.diverged[first]}")
    return notes


def one_line(stats: TensorStats) -> str:
    """What a tensor is like, in one line."""
    parts = []
    name = getattr(stats, "name", None)
    if name is not None:
        entry: ParamStats = stats  # type: ignore[assignment]
        dtype = str(entry.dtype).removeprefix("torch.")
        parts += [f"{_one_line_name(entry.name)}:", f"{dtype} {_shape(entry)}"]
    parts += [
        f"mean={number(stats.mean)}",
        f"std={number(stats.std)}",
        f"norm={number(stats.norm)}",
        f"min={number(stats.min)}",
        f"max={number(stats.max)}",
    ]
    if stats.zero_count:
        parts.append(f"zeros={percent(stats.zero_fraction)}")
    if stats.nan_count:
        parts.append(f"NaN!={stats.nan_count}")
    if stats.nonfinite_count > stats.nan_count:
        parts.append(f"Inf!={stats.nonfinite_count - stats.nan_count}")
    grad = getattr(stats, "grad", None)
    if grad is not None:
        parts.append(f"grad({one_line(grad)})")
    return " ".join(parts)


def number(x: float) -> str:
    """Four significant digits."""
    if x != 0 and math.isfinite(x) and not 1e-3 <= abs(x) < 1e5:
        return f"{x:.3e}"
    return f"{x:.4g}"


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
    mark = _printable("…", "~")
    head = (width - len(mark)) // 3
    return text[:head] + mark + text[len(text) - (width - len(mark) - head) :]


def _on_a_terminal() -> bool:
    return "COLUMNS" in os.environ or (sys.stdout is not None and sys.stdout.isatty())


def _printable(text: str, plain: str) -> str:
    """`text` where standard output can hold it: a table must not stop a run with an error."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return plain
    return text


def _longest(column: list[str]) -> int:
    return max(map(len, column))


def _width(columns: list[list[str]]) -> int:
    """Of columns with a gap before each."""
    return sum(_longest(column) + len(_GAP) for column in columns)


def _cells(summary: Summary) -> list[list[str]]:
    """The headings, a line for every name, and the total; gradients where there are any."""
    total = summary.total
    lines = [[*_HEADINGS, *_GRAD_HEADINGS]]
    for entry in summary.values():
        lines.append(
            [_one_line_name(entry.name), _shape(entry), *_figures(entry), *_grad_figures(entry)]
        )
        for alias in entry.aliases:
            lines.append([f"{_ALIAS}{_one_line_name(alias)}", *[""] * (len(lines[0]) - 1)])
    grad = [""] * len(_GRAD_HEADINGS) if total.grad is None else _figures(total.grad)
    lines.append(["total", f"{total.count:,}", *_figures(total), *grad])
    if all(entry.grad is None for entry in summary.values()):
        lines = [line[: len(_HEADINGS)] for line in lines]
    return lines


def _one_line_name(name: str) -> str:
    return name if name.isprintable() else repr(name)[1:-1]


def _grad_figures(entry: ParamStats) -> list[str]:
    if entry.grad is not None:
        return _figures(entry.grad)
    if entry.kind == "buffer":
        return ["", "", "buffer", ""]
    return ["", "", "none" if entry.requires_grad else "frozen", ""]


def _figures(stats: TensorStats) -> list[str]:
    return [*map(number, (stats.mean, stats.std, stats.norm)), percent(stats.zero_fraction)]


def _shape(entry: ParamStats) -> str:
    return "lazy" if entry.shape is None else f"[{', '.join(map(str, entry.shape))}]"


def _line(cells: Sequence[str], widths: list[int]) -> str:
    name, *rest = cells
    padded = [elide(name, widths[0]).ljust(widths[0])]
    for cell, width in zip(rest, widths[1:], strict=True):
        left = cell.startswith("[") or cell in ("shape", "lazy")
        padded.append(cell.ljust(width) if left else cell.rjust(width))
    return _GAP.join(padded)


def _html_row(tag: str, cells: list[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{markup.escape(cell)}</{tag}>' for cell in cells)}</tr>"
