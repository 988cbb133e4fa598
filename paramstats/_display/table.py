"""What a table says, line by line, before it is laid out.

A `Table` holds `Line`s, which know what they are (a block of the module tree, a tensor, another
name of one, the total) and how worrying.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from paramstats._core.format import number, one_line_name, percent, shape
from paramstats._core.options import STATS
from paramstats._core.record import Record
from paramstats._display import tree
from paramstats._findings import Finding, Findings, Severity, Thresholds
from paramstats._findings.rules import find
from paramstats._stats import ParamStats, TensorStats, merged
from paramstats._stats import entries as all_entries

What = Literal["block", "tensor", "alias", "more", "total"]

_SHORT = {"zeros": "zero_fraction"}
_COLUMNS = ("mean", "std", "norm", "zeros")
_COLUMNS_OF_ONE_KIND = ("mean", "std", "norm", "min", "max", "zeros")
_GRAD = "grad "
_ALIAS = "  = "
_NAME = "name"
QUIET = ("0%", "none", "frozen", "buffer", "-")


class Line(NamedTuple):
    what: What
    depth: int
    label: str
    name: str
    cells: list[str]
    findings: Sequence[Finding] = ()

    @property
    def severity(self) -> Severity:
        return max((finding.severity for finding in self.findings), default=Severity.INFO)

    @property
    def marks(self) -> str:
        """What is odd, in a word or two each."""
        return ", ".join(dict.fromkeys(finding.code.value for finding in self.findings))


@dataclass
class Table:
    """Headings without the name's, and lines; `kept` is never left out for want of room."""

    headings: list[str]
    lines: list[Line]
    findings: Findings
    notes: list[str]
    kept: str | None


def table(
    record: Record,
    sort_by: str | None = None,
    limit: int | None = None,
    kind: str | None = None,
) -> Table:
    """The lines of `Summary.table`, not laid out yet."""
    if kind not in (None, "param", "grad", "buffer"):
        raise ValueError(
            f"paramstats.table: expected kind to be 'param', 'grad', 'buffer' or None, got {kind!r}"
        )
    if limit is not None and (not isinstance(limit, int) or limit < 0):
        raise ValueError(f"paramstats.table: expected limit to be 0 or more, got {limit!r}")
    wanted = order(sort_by, kind)
    headings = _headings(record, kind)
    kept = wanted.heading if wanted else None
    if kept is not None and kept not in headings:
        headings.append(kept)
    findings = find(record, Thresholds()).at_least(Severity.WARNING)
    if kind is not None:
        findings = Findings(finding for finding in findings if finding.source == kind)
    lines = [
        *_body(record, headings, findings, wanted, limit, kind),
        _total(record, headings, kind),
    ]
    return Table(headings, lines, findings, _notes(record, findings), kept)


def ordered(record: Record, sort_by: str | None) -> list[str]:
    """The names in the order of `Summary.table`."""
    wanted = order(sort_by)
    entries = all_entries(record)
    return [entry.name for entry in (sorted(entries, key=wanted.key) if wanted else entries)]


class Order(NamedTuple):
    """What to sort by, and which way."""

    heading: str
    of_grad: bool
    stat: str
    smallest_first: bool

    def key(self, entry: ParamStats) -> tuple[int, float | str]:
        """NaN first, whatever has no statistic last."""
        if self.stat == _NAME:
            return 1, entry.name
        stats = entry.grad if self.of_grad else entry
        if stats is None or not stats.is_read():
            return 2, 0.0
        value = float(getattr(stats, self.stat))
        if math.isnan(value):
            return 0, 0.0
        return 1, value if self.smallest_first else -value


def order(sort_by: str | None, kind: str | None = None) -> Order | None:
    """What `sort_by` means for a table of one kind, or of all."""
    if sort_by is None:
        return None
    if not isinstance(sort_by, str):
        raise TypeError(f"paramstats.table: expected sort_by to be a str, got {sort_by!r}")
    if sort_by == _NAME:
        return Order("shape", False, _NAME, True)
    wanted = sort_by.removeprefix("-").replace("grad.", "grad_")
    stat = wanted.removeprefix("grad_")
    stat = _SHORT.get(stat, stat)
    if stat not in STATS:
        raise ValueError(
            f"paramstats.table: expected sort_by to be name or one of {', '.join(STATS)}, with "
            f"'grad.' before it for the gradient's or '-' for the smallest first, got '{sort_by}'"
        )
    of_grad = kind == "grad" or wanted.startswith("grad_")
    short = next((s for s, long in _SHORT.items() if long == stat), stat)
    heading = short if kind == "grad" or not of_grad else _GRAD + short
    return Order(heading, of_grad, stat, sort_by.startswith("-"))


def _headings(record: Record, kind: str | None) -> list[str]:
    if kind is not None:
        return ["shape", *_COLUMNS_OF_ONE_KIND]
    grads = any(entry.grad is not None for entry in all_entries(record))
    return ["shape", *_COLUMNS, *(_GRAD + column for column in _COLUMNS if grads)]


def _body(
    record: Record,
    headings: list[str],
    findings: Sequence[Finding],
    wanted: Order | None,
    limit: int | None,
    kind: str | None,
) -> Iterator[Line]:
    entries = all_entries(record)
    spans = _spans(record, kind)
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        found.setdefault(finding.name, []).append(finding)
    shown = 0
    rows = [row for begin, end in spans for row in range(begin, end)]
    for node in _nodes(entries, rows, spans, wanted):
        if limit is not None and shown == limit:
            break
        if node.is_block:
            cells = _block_cells(record, headings, node.begin, node.end, kind)
            name = entries[node.begin].name
            yield Line("block", node.depth, one_line_name(node.label), name, cells)
            continue
        entry = entries[node.begin]
        cells = [_cell(heading, entry, kind) for heading in headings]
        label = one_line_name(node.label)
        yield Line("tensor", node.depth, label, entry.name, cells, found.get(entry.name, ()))
        for alias in entry.aliases:
            label = _ALIAS + one_line_name(alias)
            yield Line("alias", node.depth, label, alias, [""] * len(headings))
        shown += 1
    if shown < len(rows):
        label = f"... and {len(rows) - shown:,} more"
        yield Line("more", 0, label, "", [""] * len(headings))


def _spans(record: Record, kind: str | None) -> list[tuple[int, int]]:
    """The rows of a table: parameters, then buffers, or one of them."""
    parameters, every = record.layout.parameters, len(record.layout)
    spans = [(0, parameters), (parameters, every)]
    return {None: spans, "buffer": spans[1:]}.get(kind, spans[:1])


def _nodes(
    entries: Sequence[ParamStats],
    rows: Sequence[int],
    spans: Sequence[tuple[int, int]],
    wanted: Order | None,
) -> Iterator[tree.Node]:
    """The outline in the model's order; a plain list in any other."""
    if wanted is not None:
        for row in sorted(rows, key=lambda row: wanted.key(entries[row])):
            yield tree.Node(0, entries[row].name, row, row + 1, False)
        return
    for begin, end in spans:
        for node in tree.outline([entry.name for entry in entries[begin:end]]):
            yield node._replace(begin=node.begin + begin, end=node.end + begin)


def _cell(heading: str, entry: ParamStats, kind: str | None) -> str:
    if heading == "shape":
        return shape(entry.shape)
    of_grad = kind == "grad" or heading.startswith(_GRAD)
    stats = entry.grad if of_grad else entry
    stat = heading.removeprefix(_GRAD)
    if stats is not None:
        return _figure(stats, stat)
    if stat != "norm":
        return ""
    if entry.kind == "buffer":
        return "buffer"
    return "none" if entry.requires_grad else "frozen"


def _figure(stats: TensorStats, stat: str) -> str:
    if not stats.is_read():
        return "-"
    if stat == "zeros":
        return percent(stats.zero_fraction)
    value = getattr(stats, stat)
    return f"{value:,}" if isinstance(value, int) else number(value)


def _block_cells(
    record: Record, headings: Sequence[str], begin: int, end: int, kind: str | None
) -> list[str]:
    """Rows [begin, end) as one."""
    block = merged(record, begin, end)
    cells = []
    for heading in headings:
        stats = block.grad if kind == "grad" or heading.startswith(_GRAD) else block
        if heading == "shape":
            cells.append(f"{block.count:,}")
        else:
            cells.append("" if stats is None else _figure(stats, heading.removeprefix(_GRAD)))
    return cells


def _total(record: Record, headings: Sequence[str], kind: str | None) -> Line:
    begin, end = _spans(record, kind)[0]
    return Line("total", 0, "total", "", _block_cells(record, headings, begin, end, kind))


def _notes(record: Record, findings: Sequence[Finding]) -> list[str]:
    """What a reader must know besides."""
    notes = []
    if record.is_local:
        notes.append("statistics of this process's part alone")
    if record.diverged:
        first, *others = record.diverged
        more = f" (and {len(others)} more)" if others else ""
        notes.append(f"copies differ: {first}{more}: {record.diverged[first]}")
    if findings:
        errors = sum(finding.severity == Severity.ERROR for finding in findings)
        counts = [
            f"{n} {word}{'s' if n > 1 else ''}"
            for n, word in ((errors, "error"), (len(findings) - errors, "warning"))
            if n
        ]
        worst = findings[0]
        notes.append(
            f"{' and '.join(counts)}, {'first ' if len(findings) > 1 else ''}"
            f"{one_line_name(worst.name)}: {worst.code.value}; advice: summary.findings()"
        )
    return notes
