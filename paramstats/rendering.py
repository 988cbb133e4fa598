"""A summary as people read it: an aligned table, HTML for notebooks, one line for one tensor."""

from __future__ import annotations

import html as markup
import math
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paramstats.summary import ParamStats, Summary, TensorStats

_HEADINGS = ("parameter", "shape", "mean", "std", "norm", "zeros")
_GRAD_HEADINGS = ("grad mean", "grad std", "grad norm", "grad zeros")
_GAP = "  "
_NARROWEST_NAME = 12
_ELLIPSIS = "…"
_ALIAS = "  = "


def table(summary: Summary, width: int | None = None) -> str:
    """Names left, figures right, the total under a line; long names elided in the middle.

    The other names of a tied parameter stand in lines of their own under it.
    """
    if width is None:
        width = shutil.get_terminal_size((120, 24)).columns
    lines = _cells(summary)
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    rest = sum(widths[1:]) + len(_GAP) * (len(widths) - 1)
    widths[0] = min(widths[0], max(width - rest, _NARROWEST_NAME))
    head, *body, total = (_line(line, widths) for line in lines)
    rule = "─" * len(head)
    return "\n".join([head, rule, *body, rule, total])


def html(summary: Summary) -> str:
    """The same as an HTML table."""
    head, *body = _cells(summary)
    return (
        f"<table>{_html_row('th', head)}{''.join(_html_row('td', line) for line in body)}</table>"
    )


def one_line(stats: TensorStats) -> str:
    """What a tensor is like, in one line."""
    parts = []
    name = getattr(stats, "name", None)
    if name is not None:
        entry: ParamStats = stats  # type: ignore[assignment]
        dtype = str(entry.dtype).removeprefix("torch.")
        parts += [f"{entry.name}:", f"{dtype}{_shape(entry)}"]
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
    """`text` with its middle left out, its end kept longest: that is where layers differ."""
    if len(text) <= width:
        return text
    head = (width - 1) // 3
    return text[:head] + _ELLIPSIS + text[len(text) - (width - 1 - head) :]


def _cells(summary: Summary) -> list[list[str]]:
    """The headings, a line for every name, and the total; gradients where there are any."""
    total = summary.total
    lines = [[*_HEADINGS, *_GRAD_HEADINGS]]
    for entry in summary.values():
        lines.append([entry.name, _shape(entry), *_figures(entry), *_grad_figures(entry)])
        for alias in entry.aliases:
            lines.append([f"{_ALIAS}{alias}", *[""] * (len(lines[0]) - 1)])
    grad = [""] * len(_GRAD_HEADINGS) if total.grad is None else _figures(total.grad)
    lines.append(["total", f"{total.count:,}", *_figures(total), *grad])
    if all(entry.grad is None for entry in summary.values()):
        lines = [line[: len(_HEADINGS)] for line in lines]
    return lines


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


def _line(cells: list[str], widths: list[int]) -> str:
    name, shape, *figures = cells
    padded = [elide(name, widths[0]).ljust(widths[0]), shape.ljust(widths[1])]
    padded += [cell.rjust(width) for cell, width in zip(figures, widths[2:], strict=True)]
    return _GAP.join(padded)


def _html_row(tag: str, cells: list[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{markup.escape(cell)}</{tag}>' for cell in cells)}</tr>"
