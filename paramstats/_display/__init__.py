"""A summary as a table: its lines, and what lays them out as text, in colour, and as HTML."""

from paramstats._display.html import html
from paramstats._display.table import order, ordered, table
from paramstats._display.text import colored, for_print, plain, rich_lines

__all__ = ["colored", "for_print", "html", "order", "ordered", "plain", "rich_lines", "table"]
