"""Write rows as CSV that neither a spreadsheet nor a terminal acts on."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from paramstats._core.format import one_line_name

_FORMULA_STARTS = tuple("=+-@\uff1d\uff0b\uff0d\uff20")
"""Spreadsheets run a cell that begins with one of these; the last four are the wide forms."""


def csv_text(fields: Sequence[str], rows: Iterable[dict[str, Any]]) -> str:
    """Return CSV text; a shape is written as 2x3, and several names with spaces between them."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        row["shape"] = "x".join(map(str, row.get("shape") or ()))
        row["aliases"] = " ".join(row.get("aliases", ()))
        writer.writerow({field: _cell(value) for field, value in row.items()})
    return out.getvalue()


def _cell(value: Any) -> Any:
    """Return a number as it is, and a text so that no spreadsheet or terminal acts on it."""
    if not isinstance(value, str):
        return value
    text = one_line_name(value)
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text
