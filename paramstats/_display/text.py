"""Lay out a table as plain or colored text."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, NamedTuple

from paramstats._core import format as formats
from paramstats._core.format import elide, printable
from paramstats._core.optional import import_optional
from paramstats._display.shorten import common_prefix, shorten
from paramstats._display.table import ALIAS, UNREMARKABLE, Line, Table
from paramstats._findings import Severity

if TYPE_CHECKING:
    from rich.text import Text

_DROP_ORDER = (
    "grad.zero_fraction",
    "grad.mean",
    "zero_fraction",
    "grad.min",
    "grad.max",
    "update.min",
    "update.max",
    "min",
    "max",
    "update.mean",
    "update.std",
    "grad.std",
    "mean",
    "std",
    "update.zero_fraction",
    "norm b",
    "largest",
    "norm a",
    "shape",
    "update_ratio",
    "|b - a|",
)
"""The order in which columns are left out if the width is too small."""

_GAP = "  "
_INDENT = "  "
_MAX_WHOLE_NAME = 48
"""Names of up to this length are not shortened; columns are left out instead."""

_MIN_NAME = 12
_NAMED = ("block", "tensor", "alias")
"""Kinds of lines that have a name; the others have a text."""

_MARKS = "findings"
_LEFT = ("[", "s", "l")
"""First characters of a shape, of the heading "shape" and of "lazy"; counts are right-aligned."""
_STYLES = {"block": "bold", "total": "bold", "alias": "dim", "more": "dim"}
_SEVERITY_STYLES = {Severity.WARNING: "yellow", Severity.ERROR: "bold red"}

Span = tuple[str, str]
"""A text and its style in rich; the style may be empty."""


def plain(table: Table, width: int | None = None) -> str:
    """Return the table as plain text of at most `width` columns, if that is possible."""
    grid = _grid(table, width)
    head, *lines = ("".join(texts).rstrip() for texts in zip(*grid.texts, strict=True))
    is_total = [line.kind == "total" for line in table.lines]
    lines = [f"{grid.rule}\n{text}" if t else text for text, t in zip(lines, is_total, strict=True)]
    return "\n".join([*grid.above, head, grid.rule, *lines, *grid.below, *table.notes])


def rich_lines(table: Table, width: int | None = None) -> Iterator[Text]:
    """Yield the lines of the table as colored text of rich."""
    text = import_optional("rich.text", "color").Text
    for line in _spans(table, width):
        yield text.assemble(*line, no_wrap=len(line) > 1)  # notes, which have one span, may wrap


def colored(table: Table, width: int | None = None) -> str:
    """Return the table as text with escape codes for colors."""
    console = import_optional("rich.console", "color").Console(
        file=io.StringIO(), force_terminal=True, width=1 << 30
    )
    console.print(*rich_lines(table, width), sep="\n", end="")
    out: str = console.file.getvalue()
    return out


def for_print(table: Table) -> str:
    """Return colored text if standard output is a color terminal and rich is installed."""
    if formats.on_terminal():
        try:
            console = import_optional("rich.console", "color").Console()
        except ImportError:
            return plain(table)
        if console.color_system is not None and not console.no_color:
            return colored(table)
    return plain(table)


class _Grid(NamedTuple):
    """The columns of a table, the names first; each begins with its heading."""

    columns: list[list[str]]
    texts: list[list[str]]
    """The same, aligned."""
    rule: str
    above: list[str]
    """The line on what all names begin with, if it is left out of the names."""
    below: list[str]
    """The note on columns that have no room."""


def _grid(table: Table, width: int | None) -> _Grid:
    width = formats.columns(width)
    labels = [line.label for line in table.lines]
    marks = [f"! {line.marks}" if line.findings else "" for line in table.lines]
    rows = (table.headings, *(line.cells for line in table.lines))
    columns = list(map(list, zip(*rows, strict=True)))
    if any(marks):
        columns.append([_MARKS, *marks])
    prefix = ""
    longest = _longest(table.lines, labels)
    if longest + _total_width(columns) > width:
        prefix = _prefix_of_all(table.lines)
        labels = [line.label.replace(prefix, "", line.kind in _NAMED) for line in table.lines]
        longest = _longest(table.lines, labels)
    columns, left_out = _fit(columns, width - min(longest, _MAX_WHOLE_NAME), table.kept)
    name_width = min(longest, max(width - _total_width(columns), _MIN_NAME))
    names = ["parameter", *_names(table.lines, labels, name_width)]
    names = [name.ljust(name_width) for name in names]
    texts = [names, *map(_aligned, columns)]
    rule = printable("─", "-") * sum(len(column[0]) for column in texts)
    note = f"left out, as the table is too wide: {', '.join(left_out)}" if left_out else ""
    above = [f"all names begin with {prefix}"] if prefix else []
    return _Grid([names, *columns], texts, rule, above, wrap(note, max(width, _MIN_NAME)))


def _longest(lines: Sequence[Line], labels: Sequence[str]) -> int:
    """Return the number of columns that the names need, heading included."""
    pairs = zip(lines, labels, strict=True)
    return max([len("parameter"), *(len(_INDENT) * line.depth + len(x) for line, x in pairs)])


def _prefix_of_all(lines: Sequence[Line]) -> str:
    """Return what all names of a list begin with; "" for an outline, which shows it once anyway."""
    labels = [line.label.removeprefix(ALIAS) for line in lines if line.kind in _NAMED]
    return common_prefix(labels) if all(line.depth == 0 for line in lines) else ""


def _names(lines: Sequence[Line], labels: Sequence[str], width: int) -> list[str]:
    """Return the texts of the names, which differ for any two lines of one module."""
    texts = [elide(label, width) for label in labels]
    rows_of: dict[tuple[int, str], list[int]] = {}
    blocks = [-1]  # the lines of the modules around the current line
    for row, line in enumerate(lines):
        del blocks[line.depth + 1 :]
        if line.kind in _NAMED:
            rows_of.setdefault((blocks[-1], line.kind), []).append(row)
        if line.kind == "block":
            blocks.append(row)
    for (_, kind), rows in rows_of.items():
        indent = _INDENT * lines[rows[0]].depth + (ALIAS if kind == "alias" else "")
        own = [labels[row].removeprefix(ALIAS) if kind == "alias" else labels[row] for row in rows]
        if len(indent) + max(map(len, own)) > width:
            indent = indent[max(0, len(indent) + _MIN_NAME - width) :]
        # A module with parameters and buffers has a line for each; these have the same name.
        keys = own if kind == "block" else rows
        short = dict(zip(keys, own, strict=True))
        short = dict(zip(short, shorten([*short.values()], width - len(indent)), strict=True))
        for row, key in zip(rows, keys, strict=True):
            texts[row] = indent + short[key]
    return texts


def _spans(table: Table, width: int | None) -> Iterator[list[Span]]:
    """Yield the spans of each line, aligned in columns."""
    grid = _grid(table, width)
    cells, texts = zip(*grid.columns, strict=True), zip(*grid.texts, strict=True)
    headings = next(cells)
    yield from ([(line, "dim")] for line in grid.above)
    yield _stripped([(text, "bold") for text in next(texts)])
    yield [(grid.rule, "dim")]
    for line, own_cells, own_texts in zip(table.lines, cells, texts, strict=True):
        if line.kind == "total":
            yield [(grid.rule, "dim")]
        style = _SEVERITY_STYLES.get(line.severity, _STYLES.get(line.kind, ""))
        spans = [(own_texts[0], style)]
        for heading, cell, text in zip(headings[1:], own_cells[1:], own_texts[1:], strict=True):
            cell_style = ""
            if heading == _MARKS or line.kind in ("block", "total"):
                cell_style = style
            elif line.kind == "tensor" and cell in UNREMARKABLE:
                cell_style = "dim"
            spans.append((text, cell_style))
        yield _stripped(spans)
    yield from ([(line, "dim")] for line in grid.below)
    yield from ([(note, "")] for note in table.notes)


def _fit(
    columns: list[list[str]], width: int, kept: str | None
) -> tuple[list[list[str]], list[str]]:
    """Leave out columns until the others fit; return these and the headings left out."""
    left_out = []
    headings = [column[0] for column in columns]
    for heading in _DROP_ORDER:
        if _total_width(columns) <= width:
            break
        if heading in headings and heading != kept:
            columns = [column for column in columns if column[0] != heading]
            left_out.append(heading)
    return columns, left_out


def _stripped(spans: list[Span]) -> list[Span]:
    """Remove spaces at the end of a line."""
    while spans and not spans[-1][0].strip():
        spans.pop()
    if spans:
        text, style = spans.pop()
        spans.append((text.rstrip(), style))
    return spans


def _aligned(column: list[str]) -> list[str]:
    """Return the cells of a column, heading included, at one width, with a gap before each."""
    width = max(map(len, column)) + len(_GAP)
    if column[0] == _MARKS:
        return [(_GAP + cell).ljust(width) for cell in column]
    if column[0] == "shape":
        column = [(_GAP + cell).ljust(width) if cell[:1] in _LEFT else cell for cell in column]
    return [cell.rjust(width) for cell in column]


def _total_width(columns: Sequence[Sequence[str]]) -> int:
    """Return the width of the columns, with a gap before each."""
    return sum(max(map(len, column)) + len(_GAP) for column in columns)
