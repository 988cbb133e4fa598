"""What this process brings to an exchange: the states of all that it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paramstats._core import moments, reference
from paramstats._core.backend import Implementation
from paramstats._core.elements import numel
from paramstats._core.layout import Layout
from paramstats._core.moments import ABSENT, ROW, Moments, unread
from paramstats._core.reading import read_rows
from paramstats._sharded.agreement import Content, content_of
from paramstats._sharded.merging import WORDS
from paramstats._sharded.partial import (
    Addend,
    Addends,
    Label,
    Plan,
    Told,
    add_up,
    added_up_in,
)
from paramstats._sharded.pieces import Held

_ABSENT = ROW.pack(*unread(ABSENT))


class Offer:
    """Rows of tensors and, after them, of gradients, as `merging` lays them out.

    Nothing here raises for what only this process has met: `error` keeps it until all processes
    have heard of it.
    """

    def __init__(
        self,
        backend: Implementation,
        layout: Layout,
        rows: Sequence[Any],
        held: Held,
        params: bool,
    ) -> None:
        self.layout = layout
        self.error: Exception | None = None
        self.unreadable: dict[str, str] = {}
        self.backend = f"{backend.name} {backend.native.simd_level() if backend.native else ''}"
        self.content, self.digest = content_of(layout, rows)
        self._backend = backend
        self._held = held
        self._params = params
        self._table = bytearray(_ABSENT * len(held.tensors))
        self._under_way: list[tuple[list[int], bytes, Sequence[reference.Transfer]]] = []
        self._mine: dict[Label, Addend] = {}
        self._addends: dict[Label, Tensor] = {}
        self._try(self._read_all)
        self.told: Told = tuple(sorted(self._mine.items()))

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

    def add_up(
        self, plan: Plan, group: dist.ProcessGroup | None, device: torch.device
    ) -> list[Moments]:
        """The states of a plan's slots, from all processes' addends."""
        parts = add_up(plan, self._mine, self._addends, group, device)
        table, transfers, _ = read_rows(self._backend, parts, True, False, str)
        table = reference.finished(table, transfers)
        return [moments.row(table, slot) for slot in range(len(parts))]

    # ---- reading

    def _try(self, read: Callable[[], None]) -> None:
        try:
            read()
        except Exception as error:
            self.error = self.error or error

    def _read_all(self) -> None:
        """But for addends, of which copies are kept."""
        rows, tensors = [], []
        n = len(self.layout)
        first = 0 if self._params else n
        numels = self.content.numels * 2
        for row, x in enumerate(self._held.tensors):
            if x is None:
                continue
            if row < first:
                self._leave(row)
            elif row in self._held.partial:
                self._leave(row, self._keep(row, x, self._held.partial[row]))
            elif x.is_complex() and numel(x) != numels[row]:
                self._leave(row, "the moduli of parts of a complex tensor cannot be joined")
            else:
                rows.append(row)
                tensors.append(x)
        self._read(rows, tensors)

    def _keep(self, row: int, x: Tensor, addends: Addends | str) -> str | None:
        """Why an addend cannot be taken; None where it is."""
        if isinstance(addends, str):
            return addends
        dtype = added_up_in(x.dtype, addends)
        if dtype is None:
            return f"partial tensors of {x.dtype} are not added up so"
        n = len(self.layout)
        label = self.layout.names[row % n], row >= n
        with torch.no_grad():
            self._addends[label] = x.detach().to(dtype, copy=True).reshape(-1)
        if x.is_meta:
            raise ValueError(f"an addend of '{self.layout.row_name(row)}' is on the meta device")
        self._mine[label] = Addend(addends, dtype, x.numel(), self._held.keys[row])
        return None

    def _read(self, rows: list[int], tensors: list[Tensor]) -> None:
        if not rows:
            return
        table, transfers, skipped = read_rows(
            self._backend, tensors, True, False, lambda i: self.layout.row_name(rows[i])
        )
        if transfers:
            self._under_way.append((rows, table, transfers))
        else:
            self._put(rows, table)
        for i, reason in skipped.items():
            self._leave(rows[i], reason)

    def _wait(self) -> None:
        for rows, table, transfers in self._under_way:
            self._put(rows, reference.finished(table, transfers))
        self._under_way.clear()

    def _put(self, rows: list[int], table: bytes) -> None:
        read = _words(bytearray(table))[: len(rows)]
        _words(self._table)[torch.tensor(rows, dtype=torch.int64)] = read

    def _leave(self, row: int, reason: str | None = None) -> None:
        """Its size alone; with a reason, marked as what could not be read."""
        tensor = self._held.tensors[row]
        state = unread(0 if tensor is None else numel(tensor))
        if reason is not None:
            state = state._replace(zeros=1)
            self.unreadable[self.layout.row_name(row)] = reason
        ROW.pack_into(self._table, row * ROW.size, *state)


class FailedOffer:
    """Of a process that got no further: it tells the others, and raises then."""

    digest = bytes(32)
    backend = ""
    layout = Layout((), (), 0, (), (), (), ())
    content: Content = Content((), (), 0, (), (), (), (), ())
    told: Told = ()
    unreadable: dict[str, str] = {}  # noqa: RUF012  # empty for good

    def __init__(self, error: Exception) -> None:
        self.error: Exception | None = error

    def rows(self) -> Tensor | None:
        return None

    def add_up(
        self, plan: Plan, group: dist.ProcessGroup | None, device: torch.device
    ) -> list[Moments]:
        raise AssertionError("an exchange ends before, where a process has failed")


def _words(table: bytearray) -> Tensor:
    """A view of a table of states."""
    if not table:
        return torch.empty((0, WORDS - 1), dtype=torch.int64)
    return torch.frombuffer(table, dtype=torch.int64).view(-1, WORDS - 1)
