"""A table as aligned text, plain or in colour."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from paramstats._core import format as rendering
from paramstats._core.format import elide, printable
from paramstats._core.optional import import_optional
from paramstats._display.table import QUIET, Table
from paramstats._findings import Severity

if TYPE_CHECKING:
    from rich.text import Text

_LEFT_OUT = ("grad mean", "mean", "grad zeros", "min", "max", "zeros", "grad std", "std", "shape")
"""In this order, where a terminal is too narrow for all columns."""

_GAP = "  "
_INDENT = "  "
_WHOLE_NAME = 48
"""Names up to this long are kept whole at the cost of columns; 80 columns have room for norms."""

_NARROWEST_NAME = 12
_STYLES = {"block": "bold", "total": "bold", "alias": "dim", "more": "dim"}
_WORRYING = {Severity.WARNING: "yellow", Severity.ERROR: "bold red"}

Span = tuple[str, str]
"""Text, and how to set it off: a style of rich, or nothing."""


def plain(table: Table, width: int | None = None) -> str:
    """Names left, statistics right, the total under a line; long names elided in the middle."""
    return "\n".join("".join(text for text, _ in line) for line in _spans(table, width))


def rich_lines(table: Table, width: int | None = None) -> Iterator[Text]:
    """The same as lines of rich's, with what is odd in colour; notes wrap where they are long."""
    text = import_optional("rich.text", "colour").Text
    for line in _spans(table, width):
        yield text.assemble(*line, no_wrap=len(line) > 1)


def colored(table: Table, width: int | None = None) -> str:
    """The same with a terminal's escape codes."""
    console = import_optional("rich.console", "colour").Console(
        file=io.StringIO(), force_terminal=True, width=1 << 30
    )
    console.print(*rich_lines(table, width), sep="\n", end="")
    out: str = console.file.getvalue()
    return out


def for_print(table: Table) -> str:
    """In colour where standard output is a terminal that has it, and rich is installed."""
    if rendering.on_terminal():
        try:
            console = import_optional("rich.console", "colour").Console()
        except ImportError:
            return plain(table)
        if console.color_system is not None and not console.no_color:
            return colored(table)
    return plain(table)


def _spans(table: Table, width: int | None) -> Iterator[list[Span]]:
    width = rendering.columns(width)
    labels = [_INDENT * line.depth + line.label for line in table.lines]
    marks = [f"! {line.marks}" if line.marks else "" for line in table.lines]
    columns = [
        [heading, *(line.cells[position] for line in table.lines)]
        for position, heading in enumerate(table.headings)
    ]
    if any(marks):
        columns.append(["", *marks])
    longest = max(len("parameter"), *map(len, labels))
    left_out = []
    for heading in _LEFT_OUT:
        if _width(columns) + min(longest, _WHOLE_NAME) <= width:
            break
        narrower = [column for column in columns if column[0] != heading or heading == table.kept]
        left_out += [heading] * (len(columns) - len(narrower))
        columns = narrower
    room = min(longest, max(width - _width(columns), _NARROWEST_NAME))
    widths = [max(map(len, column)) for column in columns]
    head = [("parameter".ljust(room), "bold")]
    head += [
        (_GAP + _aligned(column[0], column[0], w), "bold")
        for column, w in zip(columns, widths, strict=True)
    ]
    rule = [(printable("─", "-") * sum(len(text) for text, _ in head), "dim")]
    yield _stripped(head)
    yield rule
    for position, (line, label) in enumerate(zip(table.lines, labels, strict=True)):
        if line.what == "total":
            yield rule
        style = _WORRYING.get(line.severity, _STYLES.get(line.what, ""))
        spans = [(elide(label, room).ljust(room), style)]
        for column, w in zip(columns, widths, strict=True):
            cell = column[position + 1]
            quiet = "dim" if cell in QUIET and line.what == "tensor" else ""
            own = style if column[0] == "" or line.what in ("block", "total") else quiet
            spans.append((_GAP + _aligned(cell, column[0], w), own))
        yield _stripped(spans)
    if left_out:
        yield [(elide(f"no room for {', '.join(left_out)}", width), "dim")]
    for note in table.notes:
        yield [(note, "")]


def _stripped(spans: list[Span]) -> list[Span]:
    """Without blanks at the end."""
    while spans and not spans[-1][0].strip():
        spans.pop()
    if spans:
        text, style = spans.pop()
        spans.append((text.rstrip(), style))
    return spans


def _aligned(cell: str, heading: str, width: int) -> str:
    left = heading == "" or cell.startswith("[") or cell in ("shape", "lazy")
    return cell.ljust(width) if left else cell.rjust(width)


def _width(columns: Sequence[Sequence[str]]) -> int:
    """Of columns with a gap before each."""
    return sum(max(map(len, column)) + len(_GAP) for column in columns)
