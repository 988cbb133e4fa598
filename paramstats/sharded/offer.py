"""What this process brings to an exchange: the states of all that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paramstats import reference
from paramstats.engine import Engine
from paramstats.layout import Layout
from paramstats.moments import ABSENT, ROW, unread
from paramstats.sharded.agreement import Description, Label, Program, content_of, digest_of
from paramstats.sharded.merging import WORDS
from paramstats.sharded.pieces import Held, Reduction, can_reduce, reduced
from paramstats.sharding import refuse_shards

_ABSENT = ROW.pack(*unread(ABSENT))


class Offer:
    """Rows of tensors and, after them, of gradients, as `merging` lays them out.

    Nothing here raises for what only this process has met: `error` keeps it until all processes
    have heard of it.
    """

    def __init__(
        self, engine: Engine, layout: Layout, rows: Sequence[Any], held: Held, params: bool
    ) -> None:
        self.layout = layout
        self.error: Exception | None = None
        self.unreadable: dict[str, str] = {}
        self.engine = f"{engine.name} {engine.native.simd_level() if engine.native else ''}"
        self._content, self.layout_digest = content_of(layout, rows)
        self._engine = engine
        self._rows = rows
        self._held = held
        self._params = params
        self._closed = False
        self._table = bytearray(_ABSENT * len(held.tensors))
        self._under_way: list[tuple[list[int], bytes, Sequence[reference.Transfer]]] = []
        self._prepared: set[int] = set()
        self.partials: dict[Label, Reduction] = {}
        for row, (reduction, _) in held.reductions.items():
            if self._is_wanted(row) and can_reduce(reduction):
                self.partials[self._label(row)] = reduction
        self.digest = digest_of(self.layout_digest, self.partials)
        self._try(self._read_whole)

    def mesh(self, label: Label) -> Any:
        """Where a tensor or gradient is distributed; of a gradient that is None, its tensor."""
        row = self._row(label)
        if row is None:
            return None
        if row in self._held.reductions:
            return self._held.reductions[row][1]
        spec = getattr(self._rows[row % len(self.layout)], "_spec", None)
        return None if spec is None else spec.mesh

    def _label(self, row: int) -> Label:
        n = len(self.layout)
        return self.layout.names[row % n], row >= n

    def _row(self, label: Label) -> int | None:
        name, is_gradient = label
        row = self.layout.index.get(name)
        return None if row is None else row + len(self.layout) * is_gradient

    def description(self) -> Description:
        return Description(self._content, tuple(sorted(self.partials.items())))

    def prepare(self, program: Program) -> None:
        """Adds up with other processes what the program says, and reads it."""
        if not self._closed and program:
            self._try(lambda: self._read_partial(program))

    def close(self) -> None:
        """From here on the tensors may change: nothing is read any more."""
        self._closed = True

    def table(self) -> bytes:
        """The states alone; waits for what is under way on a GPU."""
        self._wait()
        return bytes(self._table)

    def rows(self) -> Tensor:
        """Keys and states; waits likewise."""
        self._wait()
        out = torch.empty((len(self._held.keys), WORDS), dtype=torch.int64)
        out[:, 0] = torch.tensor(self._held.keys, dtype=torch.int64)
        out[:, 1:] = torch.frombuffer(self._table, dtype=torch.int64).view(-1, WORDS - 1)
        return out

    def _wait(self) -> None:
        for rows, table, transfers in self._under_way:
            finished = bytearray(table)
            for transfer in transfers:
                transfer.write(finished)
            self._put(rows, finished)
        self._under_way.clear()

    # ---- reading

    def _try(self, read: Any) -> None:
        try:
            read()
        except Exception as error:
            self.error = self.error or error

    def _is_wanted(self, row: int) -> bool:
        return self._params or row >= len(self.layout)

    def _read_whole(self) -> None:
        """All that needs nobody else."""
        rows, tensors = [], []
        n = 0 if self._params else len(self.layout)
        numels = self._content.numels * 2
        for row, x in enumerate(self._held.tensors):
            if x is None:
                continue
            if row < n:
                self._leave(row)
            elif x.is_complex() and reference.numel(x) != numels[row]:
                self._leave(row, "the moduli of parts of a complex tensor cannot be joined")
            else:
                rows.append(row)
                tensors.append(x)
        if self._held.reductions:
            for row, (reduction, _) in self._held.reductions.items():
                can = can_reduce(reduction)
                self._leave(row, None if can else f"it is placed as {reduction.dims}")
            kept = [i for i, row in enumerate(rows) if row not in self._held.reductions]
            rows, tensors = [rows[i] for i in kept], [tensors[i] for i in kept]
        self._read(rows, tensors)

    def _read_partial(self, program: Program) -> None:
        addends, rows = {}, {}
        for label, (reduction, _) in program.items():
            row = self._row(label)
            if row is not None and self.partials.get(label) == reduction:
                x = self._held.tensors[row]
                assert x is not None
                addends[label], rows[label] = x, row
        with torch.no_grad():
            values = reduced(program, addends)
        mine = [label for label, row in rows.items() if row not in self._prepared]
        self._prepared.update(rows[label] for label in mine)
        self._read([rows[label] for label in mine], [values[label] for label in mine])

    def _read(self, rows: list[int], tensors: list[Tensor]) -> None:
        if not rows:
            return
        table, left, transfers = self._engine.read(tensors, True, False)
        if left:
            named = [(self.layout.row_name(rows[i]), tensor) for i, tensor in left]
            refuse_shards(named)
            self._engine.explain_cuda(tensor.device for _, tensor in left)
            table, more, unreadable = reference.fill(table, left)
            transfers = (*transfers, *more)
            self.unreadable.update(
                {self.layout.row_name(rows[i]): reason for i, reason in unreadable.items()}
            )
        if transfers:
            self._under_way.append((rows, table, transfers))
        else:
            self._put(rows, table)

    def _put(self, rows: list[int], table: bytes | bytearray) -> None:
        states = torch.frombuffer(self._table, dtype=torch.int64).view(-1, WORDS - 1)
        read = torch.frombuffer(bytearray(table), dtype=torch.int64).view(-1, WORDS - 1)
        states[torch.tensor(rows, dtype=torch.int64)] = read[: len(rows)]

    def _leave(self, row: int, reason: str | None = None) -> None:
        tensor = self._held.tensors[row]
        size = 0 if tensor is None else reference.numel(tensor)
        ROW.pack_into(self._table, row * ROW.size, *unread(size))
        if reason is not None:
            self.unreadable[self.layout.row_name(row)] = reason
