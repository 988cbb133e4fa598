"""A summary as a table: its lines, and what lays them out as text, in colour, and as HTML."""

from paramstats.report.lines import order, ordered, table
from paramstats.report.notebook import html
from paramstats.report.text import colored, for_print, plain, rich_lines

__all__ = ["colored", "for_print", "html", "order", "ordered", "plain", "rich_lines", "table"]
