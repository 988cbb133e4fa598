"""What this process brings to an exchange: the states of all that it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from paramstats import reference
from paramstats.engine import Engine
from paramstats.layout import Layout
from paramstats.moments import ABSENT, ROW, unread
from paramstats.sharded.agreement import Content, content_of
from paramstats.sharded.merging import WORDS
from paramstats.sharded.partial import Label, Partials, add_up, addends, trouble_with
from paramstats.sharded.pieces import Held, Reduction, mesh_of
from paramstats.sharding import refuse_shards

_ABSENT = ROW.pack(*unread(ABSENT))


class Offer:
    """Rows of tensors and, after them, of gradients, as `merging` lays them out.

    Nothing here raises for what only this process has met: `error` keeps it until all processes
    have heard of it.
    """

    def __init__(
        self,
        engine: Engine,
        layout: Layout,
        rows: Sequence[Any],
        held: Held,
        params: bool,
        beside: bool = False,
    ) -> None:
        """`beside`: partial tensors are left out, as adding them up is the training's own time and
        its own process groups'."""
        self.layout = layout
        self.error: Exception | None = None
        self.unreadable: dict[str, str] = {}
        self.engine = f"{engine.name} {engine.native.simd_level() if engine.native else ''}"
        self.content, self.digest = content_of(layout, rows, held)
        self._engine = engine
        self._rows = rows
        self._held = held
        self._params = params
        self._table = bytearray(_ABSENT * len(held.tensors))
        self._under_way: list[tuple[list[int], bytes, Sequence[reference.Transfer]]] = []
        self._partial_rows: dict[Label, int] = {}
        self._try(lambda: self._read_whole(beside))
        self.partials = self._partials()

    def rows(self) -> Tensor | None:
        """Keys and states; waits for what is under way on a GPU. None where there was an error."""
        self._try(self._wait)
        if self.error is not None:
            return None
        out = torch.empty((len(self._held.keys), WORDS), dtype=torch.int64)
        out[:, 0] = torch.tensor(self._held.keys, dtype=torch.int64)
        out[:, 1:] = _words(self._table)
        return out

    def table(self) -> bytes:
        """The states alone; waits likewise."""
        self._wait()
        return bytes(self._table)

    def read_partial(self, wanted: dict[Label, Reduction]) -> None:
        """Adds up with other processes what all have agreed on, and reads it."""
        if not wanted:
            return

        def mine(label: Label) -> Tensor | None:
            row = self._partial_rows.get(label)
            return None if row is None else self._held.tensors[row]

        with torch.no_grad():
            device = torch.device(self._mesh(next(iter(wanted))).device_type)
            values, trouble = addends(wanted, mine, device)
            self.error = self.error or trouble
            values = add_up(wanted, values, self._mesh)
            here = [label for label in wanted if label in self._partial_rows]
            rows, sums = [self._partial_rows[label] for label in here], [values[x] for x in here]
            self._try(lambda: self._read(rows, sums))

    # ---- what is partial

    def _partials(self) -> Partials:
        if not self._partial_rows:
            return Partials()
        rows = {label: self._held.reductions[row] for label, row in self._partial_rows.items()}
        meshes = {mesh_of(mesh) for _, mesh in rows.values()}
        told = tuple(sorted((label, reduction) for label, (reduction, _) in rows.items()))
        return Partials(told, tuple(sorted(meshes)))

    def _mesh(self, label: Label) -> Any:
        """Where a tensor or gradient is distributed; of a gradient that is None, its tensor."""
        row = self.layout.index[label[0]]
        gradient = row + label[1] * len(self.layout)
        if gradient in self._held.reductions:
            return self._held.reductions[gradient][1]
        return self._rows[row]._spec.mesh

    # ---- reading

    def _try(self, read: Callable[[], None]) -> None:
        try:
            read()
        except Exception as error:
            self.error = self.error or error

    def _read_whole(self, beside: bool) -> None:
        """All that needs nobody else."""
        rows, tensors = [], []
        n = len(self.layout)
        first = 0 if self._params else n
        numels = self.content.numels * 2
        for row, x in enumerate(self._held.tensors):
            if x is None:
                continue
            if row < first:
                self._leave(row)
            elif row in self._held.reductions:
                reduction = self._held.reductions[row][0]
                trouble = trouble_with(reduction)
                if trouble is None and beside:
                    trouble = "partial tensors are not added up by a call with async_op"
                if trouble is None:
                    self._partial_rows[self.layout.names[row % n], row >= n] = row
                self._leave(row, trouble)
            elif x.is_complex() and reference.numel(x) != numels[row]:
                self._leave(row, "the moduli of parts of a complex tensor cannot be joined")
            else:
                rows.append(row)
                tensors.append(x)
        self._read(rows, tensors)

    def _read(self, rows: list[int], tensors: list[Tensor]) -> None:
        if not rows:
            return
        table, left, transfers = self._engine.read(tensors, True, False)
        unreadable: dict[int, str] = {}
        if left:
            refuse_shards((self.layout.row_name(rows[i]), tensor) for i, tensor in left)
            self._engine.explain_cuda(tensor.device for _, tensor in left)
            table, more, unreadable = reference.fill(table, left)
            transfers = (*transfers, *more)
        if transfers:
            self._under_way.append((rows, table, transfers))
        else:
            self._put(rows, table)
        for i, reason in unreadable.items():
            self._leave(rows[i], reason)

    def _wait(self) -> None:
        for rows, table, transfers in self._under_way:
            finished = bytearray(table)
            for transfer in transfers:
                transfer.write(finished)
            self._put(rows, finished)
        self._under_way.clear()

    def _put(self, rows: list[int], table: bytes | bytearray) -> None:
        read = _words(bytearray(table))[: len(rows)]
        _words(self._table)[torch.tensor(rows, dtype=torch.int64)] = read

    def _leave(self, row: int, reason: str | None = None) -> None:
        """Its size alone; with a reason, marked as what could not be read."""
        tensor = self._held.tensors[row]
        state = unread(0 if tensor is None else reference.numel(tensor))
        if reason is not None:
            state = state._replace(zeros=1)
            self.unreadable[self.layout.row_name(row)] = reason
        ROW.pack_into(self._table, row * ROW.size, *state)


class FailedOffer:
    """Of a process that got no further: it tells the others, and raises then."""

    digest = bytes(32)
    engine = ""
    layout = Layout((), (), 0, (), (), (), ())
    content: Content = Content((), (), 0, (), (), (), (), (), ())
    partials = Partials()
    unreadable: dict[str, str] = {}  # noqa: RUF012  # empty for good

    def __init__(self, error: Exception) -> None:
        self.error: Exception | None = error

    def rows(self) -> Tensor | None:
        return None

    def read_partial(self, wanted: dict[Label, Reduction]) -> None:
        """Nothing: an exchange ends before, where a process has failed."""


def _words(table: bytearray) -> Tensor:
    """A view of a table of states."""
    if not table:
        return torch.empty((0, WORDS - 1), dtype=torch.int64)
    return torch.frombuffer(table, dtype=torch.int64).view(-1, WORDS - 1)
