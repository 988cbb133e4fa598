"""Write the report of `paramstats show` as a self-contained HTML page."""

from __future__ import annotations

import os
from collections.abc import Iterable
from html import escape
from pathlib import Path

from paramstats._core.format import one_line_name
from paramstats._display import html_of
from paramstats._display.table import Table
from paramstats._findings.findings import html_of_findings

_ENDS = (".html", ".htm")
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 1.5em; }}
.paramstats {{ max-height: none !important; margin: 1em 0; }}
</style>
</head>
<body>
<h1>{title}</h1>
{content}
</body>
</html>
"""


def check_page_path(path: str) -> None:
    """Raise ValueError for a path that does not end like an HTML page: it may be a checkpoint."""
    if not path.lower().endswith(_ENDS):
        raise ValueError(
            f"paramstats show: expected --html and the name of the page to write, which ends in "
            f".html, got {path!r}"
        )


def write_page(path: str, sources: Iterable[str], table: Table) -> None:
    """Write a page with a table, its findings and its notes.

    Args:
        path: of the page; a file that is there is replaced.
        sources: the paths of the checkpoints, which are the title.
        table: the content.

    Raises RuntimeError if the page cannot be written.
    """
    names = [one_line_name(os.path.basename(os.path.normpath(source))) for source in sources]
    notes = "".join(f"<li>{escape(one_line_name(note))}</li>\n" for note in table.notes)
    table.notes = []
    parts = [
        html_of_findings(table.findings),
        f"<ul>\n{notes}</ul>" if notes else "",
        html_of(table),
    ]
    title = f"paramstats: {escape(' and '.join(names))}"
    text = _PAGE.format(title=title, content="\n".join(filter(None, parts)))
    try:
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        reason = error.strerror or error
        raise RuntimeError(f"paramstats show: cannot write {path}: {reason}") from None
