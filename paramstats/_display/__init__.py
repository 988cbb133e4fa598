"""Summaries as tables: plain text, colored text, HTML and DataFrames."""

from paramstats._display.file_notes import file_notes
from paramstats._display.frame import frame
from paramstats._display.html import html, html_of
from paramstats._display.order import in_order, order, ordered
from paramstats._display.table import table
from paramstats._display.text import colored, for_print, plain, rich_lines

__all__ = [
    "colored",
    "file_notes",
    "for_print",
    "frame",
    "html",
    "html_of",
    "in_order",
    "order",
    "ordered",
    "plain",
    "rich_lines",
    "table",
]
