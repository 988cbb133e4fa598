"""Lay out a table as HTML for notebooks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from paramstats._core.format import one_line_name
from paramstats._core.record import Record
from paramstats._display.table import UNREMARKABLE, Line, Table, table
from paramstats._findings import Severity

MAX_TENSORS = 1000
"""Maximum number of tensors shown; browsers become slow with more."""

# The header needs an opaque background: the body scrolls below it. The variables are those of
# JupyterLab and VS Code.
_CSS = """
.paramstats { max-height: 40em; overflow: auto; }
.paramstats table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.paramstats th, .paramstats td { text-align: right; padding: 2px 8px; white-space: nowrap; }
.paramstats th {
  position: sticky; top: 0; vertical-align: bottom; border-bottom: 1px solid; white-space: normal;
  background: var(--jp-layout-color0, var(--vscode-editor-background, Canvas));
  color: var(--jp-content-font-color1, var(--vscode-editor-foreground, CanvasText));
}
.paramstats .name, .paramstats .shape, .paramstats .marks { text-align: left; }
.paramstats td.name {
  white-space: normal; overflow-wrap: break-word; min-width: 11em; max-width: 24em;
}
.paramstats td.marks { white-space: normal; min-width: 9em; }
.paramstats .block td, .paramstats .total td { font-weight: 600; }
.paramstats .block td { background: rgba(128, 128, 128, .12); }
.paramstats .total td { border-top: 1px solid; }
.paramstats .alias td, .paramstats .quiet {
  color: color-mix(in srgb, currentColor 55%, transparent);
}
.paramstats .warning td { background: rgba(255, 170, 0, .22); }
.paramstats .error td { background: rgba(230, 40, 40, .25); }
"""


def html(record: Record) -> str:
    """Return the table of a record as HTML."""
    return html_of(table(record, limit=MAX_TENSORS))


def html_of(content: Table) -> str:
    """Return a table as HTML. Tooltips show full names and the advice of findings.

    Findings follow the name, so that they are visible without scrolling to the right.
    """
    has_marks = any(line.marks for line in content.lines)
    headings = ["parameter", *(["findings"] if has_marks else []), *content.headings]
    head = "".join(
        f'<th class="{_css_class(heading)}">{_breakable(heading)}</th>' for heading in headings
    )
    body = "".join(_row(line, content.headings, has_marks) for line in content.lines)
    notes = "".join(f"<p>{escape(note)}</p>" for note in content.notes)
    return (
        f'{notes}<div class="paramstats"><style>{_CSS}</style>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(line: Line, headings: Sequence[str], has_marks: bool) -> str:
    severity = f" {line.severity.name.lower()}" if line.severity > Severity.INFO else ""
    cells = [
        f'<td class="name" style="padding-left: {8 + 16 * line.depth}px" '
        f'title="{escape(one_line_name(line.name))}">{_breakable(line.label)}</td>'
    ]
    if has_marks:
        advice = "\n".join(map(str, line.findings))
        cells.append(f'<td class="marks" title="{escape(advice)}">{escape(line.marks)}</td>')
    for heading, cell in zip(headings, line.cells, strict=True):
        quiet = " quiet" if cell in UNREMARKABLE and line.kind == "tensor" else ""
        cells.append(f'<td class="{_css_class(heading)}{quiet}">{escape(cell)}</td>')
    return f'<tr class="{line.kind}{severity}">{"".join(cells)}</tr>'


def _css_class(heading: str) -> str:
    classes = {"parameter": "name", "shape": "shape", "findings": "marks"}
    return classes.get(heading, "statistic")


def _breakable(text: str) -> str:
    """Escape a heading or a name, and let it wrap after dots and underscores inside."""
    return re.sub(r"(?<=\w[._])(?=\w)", "<wbr>", escape(text))
