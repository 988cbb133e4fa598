"""A table as HTML."""

from __future__ import annotations

import html as markup
from collections.abc import Sequence

from paramstats._core.record import Record
from paramstats._display.table import QUIET, Line, table
from paramstats._findings import Severity

_HTML_TENSORS = 1000
"""Tensors shown in a notebook; browsers grow slow beyond."""

_CSS = """
.paramstats { max-height: 40em; overflow: auto; }
.paramstats table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.paramstats th, .paramstats td { text-align: right; padding: 2px 8px; white-space: nowrap; }
.paramstats th { position: sticky; top: 0; background: Canvas; border-bottom: 1px solid; }
.paramstats .name, .paramstats .shape, .paramstats .marks { text-align: left; }
.paramstats .block td, .paramstats .total td { font-weight: 600; }
.paramstats .block td { background: rgba(128, 128, 128, .12); }
.paramstats .total td { border-top: 1px solid; }
.paramstats .alias td, .paramstats .quiet {
  color: color-mix(in srgb, currentColor 55%, transparent);
}
.paramstats .marks { white-space: normal; min-width: 9em; }
.paramstats .warning td { background: rgba(255, 170, 0, .22); }
.paramstats .error td { background: rgba(230, 40, 40, .25); }
"""


def html(record: Record) -> str:
    """The table for a notebook: full names and advice come up under the pointer."""
    made = table(record, limit=_HTML_TENSORS)
    marked = any(line.marks for line in made.lines)
    headings = ["parameter", *made.headings, *([""] if marked else [])]
    head = "".join(
        f'<th class="{_css(heading)}">{markup.escape(heading)}</th>' for heading in headings
    )
    body = "".join(_html_line(line, made.headings, marked) for line in made.lines)
    notes = "".join(f"<p>{markup.escape(note)}</p>" for note in made.notes)
    return (
        f'{notes}<div class="paramstats"><style>{_CSS}</style>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _html_line(line: Line, headings: Sequence[str], marked: bool) -> str:
    kind = line.what
    if line.severity > Severity.INFO:
        kind += f" {line.severity.name.lower()}"  # type: ignore[assignment]
    cells = [
        f'<td class="name" style="padding-left: {8 + 16 * line.depth}px" '
        f'title="{markup.escape(line.name)}">{markup.escape(line.label)}</td>'
    ]
    for heading, cell in zip(headings, line.cells, strict=True):
        quiet = " quiet" if cell in QUIET and line.what == "tensor" else ""
        cells.append(f'<td class="{_css(heading)}{quiet}">{markup.escape(cell)}</td>')
    if marked:
        advice = "\n".join(map(str, line.findings))
        cells.append(
            f'<td class="marks" title="{markup.escape(advice)}">{markup.escape(line.marks)}</td>'
        )
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def _css(heading: str) -> str:
    return {"parameter": "name", "shape": "shape", "": "marks"}.get(heading, "statistic")
