"""The content of a table, line by line, before it is laid out as text or HTML."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from paramstats._core import moments
from paramstats._core.backend import active
from paramstats._core.entries import Entry, entries, is_read, states
from paramstats._core.format import number, one_line_name, percent, shape
from paramstats._core.moments import Statistics
from paramstats._core.options import STATS
from paramstats._core.record import Record
from paramstats._core.updates import ratio
from paramstats._display.file_notes import file_notes
from paramstats._display.order import UPDATE_RATIO, Order, heading, known_kinds, order
from paramstats._display.tree import Node, outline
from paramstats._findings import Finding, Findings, Severity, Thresholds
from paramstats._findings.rules import find

_COLUMNS = ("mean", "std", "norm", "zero_fraction")
_COLUMNS_OF_ONE_KIND = ("mean", "std", "norm", "min", "max", "zero_fraction")
_COUNT, _NORM = STATS.index("count"), STATS.index("norm")
ALIAS = "  = "
"""What the label of an alias begins with."""
NO_TENSORS = "no tensors in it"
"""The line of a checkpoint file that has none."""

UNREMARKABLE = ("0%", "none", "frozen", "buffer", "-")
"""Cells that are displayed dimmed."""


class Line(NamedTuple):
    """A line of a table. Only tensors have findings."""

    kind: Literal["block", "tensor", "alias", "more", "total"]
    depth: int
    label: str
    name: str
    cells: Sequence[str]
    findings: Sequence[Finding] = ()

    @property
    def severity(self) -> Severity:
        """The highest severity of the findings; INFO if there are none."""
        return max((finding.severity for finding in self.findings), default=Severity.INFO)

    @property
    def marks(self) -> str:
        """The codes of the findings in words."""
        if not self.findings:
            return ""
        return ", ".join(dict.fromkeys(finding.code.value for finding in self.findings))


@dataclass
class Table:
    """The content of a table."""

    headings: list[str]
    """Column headings, without the heading of the name column."""
    lines: list[Line]
    findings: Findings
    """The findings of severity WARNING and above about the tensors of the table."""
    notes: list[str]
    kept: str | None
    """The heading that is never left out: the statistic that the table is sorted by."""


def table(
    record: Record,
    sort_by: str | None = None,
    limit: int | None = None,
    kind: str | None = None,
    trainable: bool = False,
) -> Table:
    """Return the content of `Summary.table`, which documents the arguments."""
    if kind not in (None, "param", "grad", "update", "buffer"):
        raise ValueError(
            f"paramstats.table: expected kind to be 'param', 'grad', 'update', 'buffer' or None, "
            f"got {kind!r}"
        )
    if limit is not None and (not isinstance(limit, int) or limit < 0):
        raise ValueError(
            f"paramstats.table: expected limit to be a whole number of 0 or more, got {limit!r}"
        )
    wanted = order(sort_by, kind, known_kinds(record))
    every = entries(record)
    findings = find(record, Thresholds(), every).at_least(Severity.WARNING)
    shown, frozen = _select(record, every, kind, trainable)
    rows = every
    if len(shown) < len(every):
        record, rows = record.take(shown), [every[row] for row in shown]
    names = record.layout.index
    findings = Findings(
        finding for finding in findings if finding.name in names and kind in (None, finding.source)
    )
    is_file = record.file is not None
    headings = _headings(rows, "param" if is_file and kind is None else kind)
    kept = wanted.heading if wanted else None
    if kept is not None and kept not in headings:
        headings.append(kept)
    builder = _Builder(record, rows, headings, kind, findings)
    lines = [*builder.body(wanted, limit)]
    if frozen:
        lines.append(builder.note(f"... {frozen:,} frozen"))
    if not every and is_file:
        lines.append(builder.note(NO_TENSORS))
    elif record.layout.parameters or kind == "buffer" or not is_file:
        lines.append(builder.total())
    notes = [*file_notes(record), *_notes(record, findings)]
    return Table(headings, lines, findings, notes, kept)


def _headings(rows: Sequence[Entry], kind: str | None) -> list[str]:
    """Return the headings of the columns of a table of this kind."""
    if kind is not None:
        of = kind if kind in ("grad", "update") else "param"
        ratios = [UPDATE_RATIO] if kind == "update" else []
        return ["shape", *(heading(column, of) for column in _COLUMNS_OF_ONE_KIND), *ratios]
    headings = ["shape", *_COLUMNS]
    if any(entry.grad is not None for entry in rows):
        headings += [heading(column, "grad") for column in _COLUMNS]
    updates = [entry.update for entry in rows if entry.update is not None]
    if updates:
        headings.append(UPDATE_RATIO)
        if any(update.zero_count > 0 for update in updates):
            headings.append(heading("zero_fraction", "update"))
    return headings


def _select(
    record: Record, every: Sequence[Entry], kind: str | None, trainable: bool
) -> tuple[Sequence[int], int]:
    """Return the rows that a table shows, and how many frozen ones are left out.

    A table of gradients or updates leaves out the frozen parameters that have none.
    """
    layout, n = record.layout, len(record.layout)
    rows: Sequence[int] = range(n)
    if kind is not None:
        rows = range(layout.parameters, n) if kind == "buffer" else range(layout.parameters)
    if trainable:
        rows = [row for row in rows if layout.requires_grad[row]]
    frozen = 0
    if kind in ("grad", "update"):
        total = len(rows)
        rows = [row for row in rows if layout.requires_grad[row] or every[row].of(kind)]
        frozen = total - len(rows)
    return rows, frozen


class _Columns(NamedTuple):
    """Neighboring columns of one kind."""

    kind: str
    """See `Entry.of`; or "update_ratio", which is one column."""
    stats: list[tuple[int, Callable[[float], str]]]
    """The position of each statistic in `Statistics`, and the function that formats it."""


def _grouped(headings: Sequence[str]) -> list[_Columns]:
    """Return the columns with these headings."""
    pairs = [(h, h) if h == UPDATE_RATIO else h.rpartition(".")[::2] for h in headings]
    groups = itertools.groupby(pairs, lambda pair: pair[0] or "param")
    return [_Columns(kind, [_column(stat) for _, stat in group]) for kind, group in groups]


def _column(stat: str) -> tuple[int, Callable[[float], str]]:
    if stat == UPDATE_RATIO:
        return -1, number
    text: Callable[[float], str] = percent if stat == "zero_fraction" else number
    return STATS.index(stat), "{:,.0f}".format if stat.endswith("count") else text


class _Builder:
    """Builds the lines of a table from the entries of a record."""

    def __init__(
        self,
        record: Record,
        rows: list[Entry],
        headings: list[str],
        kind: str | None,
        findings: Findings,
    ) -> None:
        self.record = record
        self.rows = rows
        self.kind = kind
        self.groups = _grouped(headings[1:])  # without that of the shape
        # What is merged for blocks and the total: twice, as merge_rows expects gradients, too.
        merging = {"param", *(columns.kind for columns in self.groups)}
        if UPDATE_RATIO in merging:
            merging = merging - {UPDATE_RATIO} | {"update"}
        self.tables = {one: 2 * states(record, one) for one in merging}
        self.no_cells = [""] * len(headings)
        self.findings: dict[str, list[Finding]] = {}
        for finding in findings:
            self.findings.setdefault(finding.name, []).append(finding)

    def body(self, wanted: Order | None, limit: int | None) -> Iterator[Line]:
        """Yield the lines of tensors: an outline of modules, or a list if sorted."""
        shown = 0
        for node, first, entry in self._nodes(wanted):
            if limit is not None and shown == limit:
                break
            label = one_line_name(node.label)
            if node.is_block:
                cells = self._merged(first + node.begin, first + node.end)
                yield Line("block", node.depth, label, entry.name, cells)
                continue
            missing = "none" if entry.requires_grad else "frozen"
            if entry.kind == "buffer":
                missing = "buffer"
            size = shape(entry.shape)
            if entry.shape is None and is_read(entry.value):  # a module of `Record.by_module`
                size = f"{entry.value.count:,.0f}"
            cells = self._cells(size, entry.of, missing)
            findings = self.findings.get(entry.name, ())
            yield Line("tensor", node.depth, label, entry.name, cells, findings)
            for alias in entry.aliases:
                label = ALIAS + one_line_name(alias)
                yield Line("alias", node.depth, label, alias, self.no_cells)
            shown += 1
        if shown < len(self.rows):
            yield self.note(f"... and {len(self.rows) - shown:,} more")

    def note(self, label: str) -> Line:
        """Return a line without statistics."""
        return Line("more", 0, label, "", self.no_cells)

    def total(self) -> Line:
        """Return the line of all parameters together, or of all buffers in a table of buffers."""
        end = len(self.rows) if self.kind == "buffer" else self.record.layout.parameters
        of = " of the model" if self.record.file is not None and end < len(self.rows) else ""
        return Line("total", 0, f"total{of}", "", self._merged(0, end))

    def _nodes(self, wanted: Order | None) -> Iterator[tuple[Node, int, Entry]]:
        """Yield the nodes of the outline, what to add to their rows, and their first tensor."""
        if wanted is not None:
            for entry in wanted.sorted(self.rows):
                yield Node(0, entry.name, 0, 0, False), 0, entry
            return
        parameters = self.record.layout.parameters
        for first, part in ((0, self.rows[:parameters]), (parameters, self.rows[parameters:])):
            for node in outline([entry.name for entry in part]):
                yield node, first, self.rows[first + node.begin]

    def _merged(self, begin: int, end: int) -> tuple[str, ...]:
        """Return the cells of the tensors [begin, end) merged into one."""
        record, found = self.record, {}
        for kind, table in self.tables.items():
            merged, row = active().merge_rows(table, begin, end), int(kind != "param")
            if not moments.is_absent(merged, row):
                scale = record.grad_scale if kind == "grad" else 1
                found[kind] = moments.finalize_row(merged, row, record.correction, scale)
        counted = found.get(self.kind if self.kind in ("grad", "update") else "param")
        count = 0 if counted is None else counted.count
        return self._cells(f"{count:,.0f}", found.get, "")

    def _cells(
        self, size: str, of: Callable[[str], Statistics | None], missing_norm: str
    ) -> tuple[str, ...]:
        """Return the cells of a line.

        Args:
            size: the cell of the shape.
            of: returns the statistics of a kind.
            missing_norm: the text for the norm of what is missing.
        """
        cells = [size]
        for kind, columns in self.groups:
            statistics = of("update" if kind == UPDATE_RATIO else kind)
            if statistics is None:
                cells += [missing_norm if position == _NORM else "" for position, _ in columns]
            elif not is_read(statistics):
                cells += [
                    text(statistics.count) if position == _COUNT else "-"
                    for position, text in columns
                ]
            elif kind == UPDATE_RATIO:
                value = of("param")
                if value is None or not is_read(value):
                    cells.append("-")
                else:
                    cells.append(number(ratio(statistics.norm, value.norm)))
            else:
                cells += [text(statistics[position]) for position, text in columns]
        return tuple(cells)  # unlike a list, it costs the garbage collector nothing


def _notes(record: Record, findings: Findings) -> list[str]:
    """Return the lines below the table."""
    notes = []
    if record.is_local:
        notes.append("statistics of this rank's part only")
    if record.diverged:
        first, *others = record.diverged
        more = f" (and {len(others)} more)" if others else ""
        name, ranks = map(one_line_name, (first, record.diverged[first]))
        notes.append(f"replicas differ: {name}{more}: {ranks}")
    if findings:
        errors = sum(finding.severity == Severity.ERROR for finding in findings)
        counts = [
            f"{n} {word}{'s' if n > 1 else ''}"
            for n, word in ((errors, "error"), (len(findings) - errors, "warning"))
            if n
        ]
        worst, which = findings[0], "first: " if len(findings) > 1 else ""
        notes.append(
            f"{' and '.join(counts)}, {which}{one_line_name(worst.name)}: {worst.code.value}; "
            "for advice, call summary.findings()"
        )
    return notes
