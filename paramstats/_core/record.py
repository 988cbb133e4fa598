"""`Record`: the states of a model's tensors, from which all tables and findings are made."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch

from paramstats._core import details as detail
from paramstats._core import moments
from paramstats._core.backend import active
from paramstats._core.details import NO_DETAILS, Details
from paramstats._core.layout import Layout
from paramstats._core.layout import joined as joined_layout
from paramstats._core.moments import ROW, Moments
from paramstats._core.names import Patterns
from paramstats._core.optimizer_record import OptimizerRecord, pick
from paramstats._core.torch_private import without_modes

NO_NAMES: Mapping[str, str] = MappingProxyType({})


class FileSource(NamedTuple):
    """The group and label of each tensor of a checkpoint file, and notes on the file."""

    groups: Mapping[str, str]
    """What each tensor belongs to, by name: "model", "optimizer" or "other"."""
    labels: Mapping[str, str]
    """What the elements of a tensor are if it is not an ordinary one, by name."""
    notes: tuple[str, ...]
    """Lines about what is in the file but not among the tensors."""

    def kind(self, name: str) -> str:
        """Return "param" for a tensor of the model, otherwise its group."""
        group = self.groups.get(name, "model")
        return "param" if group == "model" else group


class Record(NamedTuple):
    """The states of a model's tensors and gradients, and what is needed to interpret them.

    `table` holds 2 N rows of `Moments` for N tensors: the tensors, then their gradients. The count
    of a row is `ABSENT` where there is no gradient. States of gradients still contain `grad_scale`;
    statistics are divided by it.
    """

    layout: Layout
    table: bytes
    correction: float = 1.0
    grad_scale: float = 1.0
    skipped: Mapping[str, str] = NO_NAMES
    """Why a tensor could not be read, by name; "NAME (gradient)" for a gradient, and so on."""
    diverged: Mapping[str, str] = NO_NAMES
    """Which ranks differ where all should hold the same values, by name."""
    is_local: bool = False
    """Whether the states cover only this rank's part of a sharded model."""
    optimizer: OptimizerRecord | None = None
    """The updates and the optimizers' state, if they were asked for."""
    details: Details = NO_DETAILS
    """Distributions, rows and zero rows, by the row of the table, where there are any."""
    file: FileSource | None = None
    """Set if the tensors are those of a checkpoint file."""

    def state(self, row: int) -> Moments:
        """Return the state of a row of the table."""
        return moments.row(self.table, row)

    def packed(self, row: int) -> bytes:
        """Return a row of the table as bytes."""
        return self.table[row * ROW.size : (row + 1) * ROW.size]

    def merged(self, begin: int, end: int) -> bytes:
        """Return the table of the tensors [begin, end) merged into one; see `merge_rows`."""
        return active().merge_rows(self.table, begin, end)

    def total(self) -> Record:
        """Return a record with one row, "total", merged from all parameters."""
        n, optimizer = self.layout.parameters, self.optimizer
        if optimizer is not None:
            optimizer = optimizer.merged([range(n)])
        table = self.merged(0, n)
        details = self._merged_details([range(n)], table)
        return self._replace(
            layout=_layout_of_total(), table=table, optimizer=optimizer, details=details
        )

    def scalars(self, keys: dict[Any, None], columns: bytes, total: bytes) -> dict[Any, float]:
        """Return `{key: statistic}` of all rows that were read; see `moments.scalars`.

        `total` is another table, whose rows follow those of this record.
        """
        return active().scalars(self.table, total, keys, columns, self.correction, self.grad_scale)

    def statistics(self) -> bytes:
        """Return a float64 row of all statistics per row; see `moments.finalize_table`."""
        return active().finalize_table(self.table, self.correction, self.grad_scale)

    def select(self, include: Patterns | None, exclude: Patterns) -> Record:
        """Return the record of the tensors that `include` and `exclude` select."""
        layout, rows = self.layout.select(include, exclude)
        return self.take(rows, layout)

    def take(self, rows: Sequence[int], layout: Layout | None = None) -> Record:
        """Return the record of these tensors, in ascending order; `layout` is theirs if known."""
        layout = self.layout.take(rows) if layout is None else layout
        names = set(layout.names)

        def selected(reasons: Mapping[str, str]) -> dict[str, str]:
            # "NAME (gradient)", "NAME (exp_avg)" and so on stay with NAME.
            return {
                row: why
                for row, why in reasons.items()
                if row in names or row.rpartition(" (")[0] in names
            }

        return self._replace(
            layout=layout,
            table=self._rows_of(rows),
            skipped=selected(self.skipped),
            diverged=selected(self.diverged),
            optimizer=None if self.optimizer is None else self.optimizer.take(rows),
            details=detail.moved(self.details, self._both(rows)),
        )

    def by_module(self, depth: int) -> Record:
        """Return a record with one row per module at `depth`, merged from its tensors' rows."""
        layout, groups = self.layout.by_module(depth)
        grouped = [row for group in groups for row in group]
        sorted_table = self._rows_of(grouped)
        ends = list(itertools.accumulate(map(len, groups), initial=0))
        tables = [active().merge_rows(sorted_table, *ends[i : i + 2]) for i in range(len(groups))]
        merged = b"".join(
            table[part] for part in (slice(ROW.size), slice(ROW.size, None)) for table in tables
        )
        optimizer = None if self.optimizer is None else self.optimizer.merged(groups)
        details = self._merged_details(groups, merged)
        return self._replace(layout=layout, table=merged, optimizer=optimizer, details=details)

    def _rows_of(self, tensors: Sequence[int]) -> bytes:
        """Return the rows of these tensors, then those of their gradients."""
        table, size = self.table, ROW.size
        begins = [row * size for row in self._both(tensors)]
        return b"".join([table[begin : begin + size] for begin in begins])

    def _both(self, tensors: Sequence[int]) -> list[int]:
        """Return the rows of these tensors, then those of their gradients."""
        n = len(self.table) // ROW.size // 2
        return [*tensors, *[n + row for row in tensors]]

    def _merged_details(self, groups: Sequence[Sequence[int]], table: bytes) -> Details:
        """Return the details of groups of tensors, of which `table` has the merged states."""
        if not self.details:
            return NO_DETAILS
        n = len(self.layout)
        both = [*groups, *[[n + row for row in rows] for rows in groups]]
        counts = [moments.finite_count(moments.row(table, row)) for row in range(len(both))]
        found = map(detail.merged, itertools.repeat(self.details), both, counts)
        return {row: one for row, one in enumerate(found) if one is not None}


@functools.cache
@without_modes()  # a mode of the user must not see that a device is created
def _layout_of_total() -> Layout:
    """Return the layout of `Record.total`. Its dtype and device have no meaning."""
    cpu = torch.device("cpu")
    return Layout(("total",), ((),), 1, (None,), (torch.float32,), (cpu,), (False,))


def joined(records: Sequence[Record], order: Layout) -> Record:
    """Return the record of the tensors of several records.

    Args:
        records: no two have a tensor in common; all know of optimizers, or none does.
        order: its tensors come in its order, others after them, parameters before buffers.
    """

    def place(of: tuple[Record, int]) -> tuple[bool, int]:
        layout, row = of[0].layout, of[1]
        return row >= layout.parameters, order.index.get(layout.names[row], len(order))

    rows = [(record, row) for record in records for row in range(len(record.layout))]
    rows.sort(key=place)
    places = rows + [(record, len(record.layout) + row) for record, row in rows]
    keys = tuple(dict.fromkeys(key for r in records if r.optimizer for key in r.optimizer.keys))
    of_optimizers = [(r.optimizer, row) for r, row in rows if r.optimizer is not None]
    return records[0]._replace(
        layout=joined_layout([(record.layout, row) for record, row in rows]),
        table=b"".join([record.packed(row) for record, row in places]),
        skipped={name: why for record in records for name, why in record.skipped.items()},
        diverged={name: why for record in records for name, why in record.diverged.items()},
        optimizer=pick(of_optimizers, keys) if of_optimizers else None,
        details={
            new: record.details[old]
            for new, (record, old) in enumerate(places)
            if old in record.details
        },
    )


class Deferred(Protocol):
    """A record that is still being computed, by a device or by a collective call."""

    def record(self) -> Record | None:
        """Return the record without waiting, with a table that may be incomplete.

        None if other ranks decide what is in it.
        """

    def ready(self) -> bool:
        """Return whether `result` would not wait."""

    def result(self) -> Record:
        """Wait for the record and return it; raises what computing it raised."""
