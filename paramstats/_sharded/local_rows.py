"""Read the shards of this rank into the rows that it sends in an exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from paramstats._core import moments, reference
from paramstats._core.backend import Implementation
from paramstats._core.details import (
    MOST_ROWS,
    NO_ZERO_ROWS,
    NOT_KNOWN,
    READ_DISTRIBUTION,
    READ_ROWS,
    Detail,
    pack_rows,
)
from paramstats._core.elements import numel
from paramstats._core.layout import Layout
from paramstats._core.moments import ABSENT_ROW, ROW, Moments, unread
from paramstats._core.reading import Rows, read_rows, reasons_by_name
from paramstats._core.record import Record
from paramstats._core.updates import ROWS, Update
from paramstats._sharded import partial
from paramstats._sharded.agreement import content_of
from paramstats._sharded.collectives import Ranks
from paramstats._sharded.details import ShardDetail, packed
from paramstats._sharded.local_shards import NO_ROWS, LocalShards
from paramstats._sharded.merging import WORDS
from paramstats._sharded.parts import LocalParts, Parts


class LocalRows:
    """The states of this rank's shards: a row per tensor, then per gradient, then per part.

    An error while reading is not raised but kept in `error`, because the other ranks already wait
    for this one. The exchange raises it after all ranks know about it.
    """

    def __init__(
        self,
        backend: Implementation,
        layout: Layout,
        rows: Sequence[Any],
        shards: LocalShards,
        params: bool,
        optimizers: LocalParts | None = None,
        flags: bytes = b"",
    ) -> None:
        self.layout = layout
        self.error: Exception | None = None
        self.skipped: dict[str, str] = {}
        """Why a shard could not be read, by the name of its row."""
        self.detail_reasons: dict[str, str] = {}
        """Why a detail could not be read, by "NAME (distribution)" and so on."""
        self.backend = f"{backend.name} {backend.native.simd_level() if backend.native else ''}"
        parts = Parts() if optimizers is None else optimizers.parts
        self.content, self.digest = content_of(layout, rows, parts)
        self._updates = [] if optimizers is None else optimizers.updates
        self._known = {} if optimizers is None else optimizers.states
        self._first_part = 2 * len(layout)
        self._backend = backend
        self._shards = shards
        self._flags = flags
        self._details: dict[int, Detail] = {}
        self._table = bytearray(ABSENT_ROW * len(shards.tensors))
        self._pending: tuple[dict[int, int], Rows] | None = None
        self._partial_specs: dict[partial.Label, partial.PartialSpec] = {}
        self._partial_values: dict[partial.Label, Tensor] = {}
        self._try(lambda: self._read_all(params))
        for part, state in self._known.items():
            self._put(self._first_part + part, state)
        for part, reason in ({} if optimizers is None else optimizers.reasons).items():
            self._put_unread(self._first_part + part, self._known[part].count, reason)
        self.partial_specs: partial.PartialSpecs = tuple(sorted(self._partial_specs.items()))

    @classmethod
    def failed(cls, backend: Implementation, error: Exception) -> LocalRows:
        """Return the rows of a rank that failed before it could read anything."""
        layout = Layout((), (), 0, (), (), (), ())
        rows = cls(backend, layout, (), LocalShards(layout, (), False), True)
        rows.error = error
        return rows

    def rows(self) -> Tensor | None:
        """Wait for transfers from GPUs and return all rows; None if there was an error."""
        self._try(self._wait)
        if self.error is not None:
            return None
        out = torch.empty((len(self._shards.indexes), WORDS), dtype=torch.int64, device="cpu")
        out[:, 0] = torch.tensor(self._shards.indexes, dtype=torch.int64, device="cpu")
        out[:, 1:] = _words(self._table)
        return out

    def message(self, positions: Tensor) -> bytes:
        """Return the details of this rank's shards as a message to the other ranks.

        Args:
            positions: the row of each of this rank's rows in the merged table.
        """
        shards, message = self._shards, {}
        for row, detail in self._details.items():
            local = shards.tensors[row]
            assert local is not None
            row_numel = local.numel() // max(1, local.shape[0]) if local.dim() else 1
            place = shards.indexes[row], shards.first_rows[row], row_numel
            message[int(positions[row])] = ShardDetail(*place, detail)
        return packed(message)

    def record(self) -> Record:
        """Wait for transfers from GPUs and return the record of this rank's shards."""
        self._wait()
        table, end = bytes(self._table), self._first_part * ROW.size
        of_optimizers = self.content.parts.record(self.layout, table[end:])
        return Record(
            self.layout,
            table[:end],
            skipped=self.skipped | self.detail_reasons,
            is_local=True,
            optimizer=of_optimizers,
            details=self._details,
        )

    def reduce_partials(self, plan: partial.Plan, ranks: Ranks) -> list[Moments]:
        """Reduce the ranks' partial tensors and return the state of each slot of the plan."""
        reduced = partial.reduce_partials(plan, self._partial_specs, self._partial_values, ranks)
        table, transfers, *_ = read_rows(self._backend, reduced, True, False, str)
        table = reference.finished(table, transfers)
        return [moments.row(table, slot) for slot in range(len(reduced))]

    def _try(self, read: Callable[[], None]) -> None:
        try:
            read()
        except Exception as error:
            self.error = self.error or error

    def _read_all(self, params: bool) -> None:
        """Read all shards; of partial tensors, keep a copy of the values."""
        operands = {row for update, _ in self._updates for row in update.operands()}
        only_operands = []
        reductions, known = self._shards.reductions, len(self.layout) if not params else 0
        rows: list[int] = []
        for row, x in enumerate(self._shards.tensors):
            if x is None:
                continue
            is_special = row < known or row in reductions or x.is_complex()
            if is_special and not self._can_read(row, x, params):
                if row not in operands:
                    continue
                only_operands.append(len(rows))
            rows.append(row)
        if not rows:
            return
        targets = dict(enumerate(rows))
        updates: list[Update] = []
        if self._updates:
            positions = {row: i for i, row in targets.items()} | {-1: -1}
            for i in only_operands:
                del targets[i]
        for update, part in self._updates:
            first = 2 * len(rows) + len(ROWS) * len(updates)
            for k in ROWS:
                if part + k not in self._known:
                    targets[first + k] = self._first_part + part + k
            updates.append(update.with_operands(positions[row] for row in update.operands()))

        def row_name(i: int) -> str:
            return self._row_name(rows[i] if i < len(rows) else targets[i])

        tensors = [self._shards.tensors[row] for row in rows]
        flags = bytes(self._flags_of(row) for row in rows)
        read = read_rows(self._backend, tensors, True, False, row_name, updates, flags)
        self._pending = targets, read
        self._updates = []  # which hold copies of parameters

    def _flags_of(self, row: int) -> int:
        """Return which details to read of a shard."""
        if row >= self._first_part:
            return NO_ZERO_ROWS
        flags = self._flags[row % len(self.layout)] if self._flags else 0
        if self._shards.first_rows[row] == NO_ROWS and not flags & READ_ROWS:
            flags |= NO_ZERO_ROWS
        return flags

    def _can_read(self, row: int, x: Tensor, params: bool) -> bool:
        """Return whether to read a shard; otherwise, write a state that has only its size."""
        n, reason = len(self.layout), None
        if row < n and not params:
            pass
        elif row in self._shards.reductions:
            reason = self._keep_values(row, x, self._shards.reductions[row])
            asked = {"distribution": READ_DISTRIBUTION, "rows": READ_ROWS}
            flags, why = self._flags_of(row), "details of partial tensors are not read"
            both: dict[int | tuple[int, str], str] = {
                (row, what): why for what, bit in asked.items() if flags & bit
            }
            self.detail_reasons |= reasons_by_name(both, self._row_name)
        else:
            part = row - 2 * n
            content = self.content
            whole = content.numels[row % n] if part < 0 else content.parts.rows[part].numel
            if numel(x) == whole:
                return True
            reason = "shards of a complex tensor cannot be merged"
        self._put_unread(row, numel(x), reason)
        return False

    def _keep_values(self, row: int, x: Tensor, reduction: partial.Reduction | str) -> str | None:
        """Copy the values of a partial tensor. Return a reason if it cannot be reduced."""
        if isinstance(reduction, str):
            return reduction
        dtype = partial.reduction_dtype(x.dtype, reduction)
        if dtype is None:
            return f"partial tensors of dtype {x.dtype} cannot be reduced"
        if x.is_meta:
            raise ValueError(
                f"paramstats.summarize: expected the partial tensor {self.layout.row_name(row)!r} "
                f"on a device with values, got the meta device"
            )
        n = len(self.layout)
        label = self.layout.names[row % n], row >= n
        with torch.no_grad():
            self._partial_values[label] = x.detach().to(dtype, copy=True).reshape(-1)
        index = self._shards.indexes[row]
        self._partial_specs[label] = partial.PartialSpec(reduction, dtype, x.numel(), index)
        return None

    def _wait(self) -> None:
        """Wait for transfers from GPUs and write all states into the table."""
        if self._pending is None:
            return
        targets, (table, transfers, reasons, details) = self._pending
        self._pending = None
        table = reference.finished(table, transfers)
        details = reference.all_details(details, transfers)
        words = _words(bytearray(table))
        _words(self._table)[_index(targets.values())] = words[_index(targets)]
        of_details: dict[int | tuple[int, str], str] = {}
        for key, reason in reasons.items():
            if isinstance(key, tuple):  # a row and its detail
                of_details[targets[key[0]], key[1]] = reason
            elif key in targets:
                self._put_unread(targets[key], moments.row(table, key).count, reason)
        self.detail_reasons |= reasons_by_name(of_details, self._row_name)
        for source, detail in details.items():
            if targets.get(source, self._first_part) < self._first_part:
                self._details[targets[source]] = detail
        self._add_zero_rows()

    def _add_zero_rows(self) -> None:
        """Add the zero rows of shards with zeros only, and say where they are not known."""
        for row, (count, zeros, _, _, _, mean, *_) in enumerate(ROW.iter_unpack(self._table)):
            x = self._shards.tensors[row] if row < self._first_part else None
            if x is None or x.dim() == 0:
                continue
            zero_rows = None
            if row in self._shards.reductions or (
                zeros > 0 and mean == mean and self._shards.first_rows[row] == NO_ROWS
            ):
                zero_rows = NOT_KNOWN
            elif zeros == count > 0 and mean == 0:
                rows = x.shape[0]
                zero_rows = pack_rows(b"\1" * rows) if rows <= MOST_ROWS else NOT_KNOWN
            if zero_rows is not None:
                self._details[row] = self._details.get(row, Detail())._replace(zero_rows=zero_rows)

    def _put_unread(self, row: int, count: int, reason: str | None = None) -> None:
        """Write a state that has only a number of elements; a reason marks it as unreadable."""
        state = unread(count)
        if reason is not None:
            state = state._replace(zeros=1)
            self.skipped[self._row_name(row)] = reason
        self._put(row, state)

    def _put(self, row: int, state: Moments) -> None:
        ROW.pack_into(self._table, row * ROW.size, *state)

    def _row_name(self, row: int) -> str:
        return self.content.parts.row_name(self.layout, row)


def _index(rows: Iterable[int]) -> Tensor:
    return torch.tensor([*rows], dtype=torch.int64, device="cpu")


def _words(table: bytearray) -> Tensor:
    """Return a view of a table of states as rows of int64 words."""
    if not table:
        return torch.empty((0, WORDS - 1), dtype=torch.int64, device="cpu")
    return torch.frombuffer(table, dtype=torch.int64).view(-1, WORDS - 1)
