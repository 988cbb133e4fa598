"""Read tensors with torch operators: the reference backend, and the fallback of the native one.

The native kernels cannot read every tensor: it may be sparse, complex, quantized, on another device
or of a subclass with its own operators. Those tensors are read here with either backend.

Small tensors are read together (`packing`), others one by one (`states`). The states of an
accelerator's tensors are brought to the CPU by one transfer.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from paramstats._core import moments
from paramstats._core.cuda import refuse_capture
from paramstats._core.denormals import threads_with_denormals
from paramstats._core.detail_reader import NO_FLOAT64, DetailReader, Reasons, reason_of
from paramstats._core.details import NO_DETAILS, Details
from paramstats._core.elements import check_storage, dense_numel, elements, gradient, numel
from paramstats._core.forked import threads_that_exist
from paramstats._core.moments import ABSENT_ROW, ROW, Moments, State, constant, merge, unread
from paramstats._core.packing import (
    MAX_NUMEL,
    MAX_NUMEL_DEVICE,
    Group,
    states_on_cpu,
    states_on_device,
)
from paramstats._core.reference_details import Words
from paramstats._core.states import exact, flat, from_row, of_complex, on_cpu
from paramstats._core.torch_private import without_modes
from paramstats._core.transfers import Pending, Transfer

_DEVICE_CHUNK = 1 << 24
"""Elements per chunk on an accelerator, of which temporaries in float64 take 128 MiB each."""

_FEW = 32
"""States up to which Python writes them faster into the table than torch operators do."""

_M2 = Moments._fields.index("m2")


def finished(table: bytes, transfers: Sequence[Transfer]) -> bytes:
    """Wait for transfers and return the table with their states."""
    out = bytearray(table)
    for transfer in transfers:
        transfer.write(out)
    return bytes(out)


def all_details(details: Details, transfers: Sequence[Transfer]) -> Details:
    """Return details and those of transfers, after `finished`."""
    more = [own for transfer in transfers if (own := transfer.details())]
    return {row: one for own in (details, *more) for row, one in own.items()} if more else details


DeferredRows = Sequence[tuple[int, Tensor]]
"""Rows that `fill` must read, each with its tensor."""


@without_modes()
def read(
    tensors: list[Tensor],
    params: bool,
    grads: bool,
    *,
    updates: Sequence[Any] = (),
    details: bytes = b"",
) -> tuple[bytes, DeferredRows, Sequence[Transfer], Details]:
    """Return a table without states, the rows that Python must read, no transfers and no details.

    Args:
        tensors: the tensors.
        params: whether to read the tensors.
        grads: whether to read their gradients.
        updates: updates of parameters, each with four rows after those of gradients; only the first
            of these is among the rows that are returned.
        details: without effect; `fill` reads them.
    """
    n = len(tensors)
    rows = ABSENT_ROW * n if params else b"".join(ROW.pack(*unread(numel(t))) for t in tensors)
    deferred_rows = list(enumerate(tensors)) if params else []
    if grads:
        deferred_rows += [
            (row, grad) for row, t in enumerate(tensors, n) if (grad := gradient(t)) is not None
        ]
    if updates:
        deferred_rows += [(2 * n + 4 * u, tensors[x.param]) for u, x in enumerate(updates)]
    return rows + ABSENT_ROW * (n + 4 * len(updates)), deferred_rows, (), NO_DETAILS


@without_modes()
def fill(
    table: bytes, deferred_rows: DeferredRows, params: bool = True, flags: bytes = b""
) -> tuple[bytes, tuple[Transfer, ...], Reasons, Details]:
    """Read the rows that a backend has deferred.

    Args:
        table: the table that the backend returned.
        deferred_rows: rows and their tensors.
        params: whether to read the tensors themselves; otherwise only their sizes.
        flags: which details to read: a byte for each tensor, or b"".

    Returns:
        The table with these rows, the transfers that complete it, why a row could not be read, and
        the details of these rows.

    Raises:
        RuntimeError: a CUDA stream that would be used is being captured into a graph.
    """
    devices = {tensor.device for _, tensor in deferred_rows if not tensor.is_cpu}
    if devices:
        refuse_capture(device.index for device in devices if device.type == "cuda")
    reader = _Reader(table)
    large, others, most = [], [], 0
    first = 0 if params else len(table) // ROW.size // 2
    with torch.no_grad(), threads_that_exist():
        for row, tensor in deferred_rows:
            n = dense_numel(tensor)
            if row < first:
                reader.write(row, unread(numel(tensor)))
            elif n > MAX_NUMEL and tensor.is_cpu:
                large.append((row, tensor))
                most = max(most, n)
            elif not reader.add_small(row, tensor, n):
                others.append((row, tensor))
                most = max(most, numel(tensor) if tensor.is_cpu else 0)
        with threads_with_denormals(most):
            for row, tensor in large:
                reader.read_alone(row, tensor.view(-1))
            for row, tensor in others:
                reader.read(row, tensor)
            wanted = [(row, x, flags[row % len(flags)] if flags else 0) for row, x in deferred_rows]
            details = DetailReader([one for one in wanted if one[0] >= first], reader.skipped)
            transfers = reader.finish(details.on_devices())
            details.on_cpu(bytes(reader.table))
    return bytes(reader.table), transfers, reader.skipped, details.found


class _Reader:
    """Reads tensors into rows of a table.

    Args:
        table: the table that the backend returned.
    """

    def __init__(self, table: bytes) -> None:
        self.table = bytearray(table)
        self.skipped: Reasons = {}
        self._small: dict[Any, Group] = {}
        self._zeros: dict[int, int] = {}
        """The zeros that a tensor has in addition to its elements, by row."""
        self._on_device: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
        """Rows and their states on devices; a row may have several."""

    def write(self, row: int, state: State) -> None:
        ROW.pack_into(self.table, row * ROW.size, *state)

    def read(self, row: int, tensor: Tensor) -> None:
        """Read any tensor, or note why it cannot be read."""
        self._try(row, tensor, self._state)

    def read_alone(self, row: int, x: Tensor) -> None:
        """Read a flat real tensor, or note why it cannot be read."""
        self._try(row, x, self._alone)

    def _try(self, row: int, x: Tensor, read: Callable[[int, Tensor], Moments | None]) -> None:
        try:
            state = read(row, x)
        except Exception as error:  # a subclass may raise anything; training goes on
            state = None
            self.skipped[row] = reason_of(error, x)
            self._zeros.pop(row, None)
        self.write(row, state or unread(numel(x)))

    def _state(self, row: int, tensor: Tensor) -> Moments | None:
        """Return the state of any tensor, or None if it is not computed or transferred yet."""
        if tensor.device.type == "meta" or is_lazy(tensor):
            return None
        x, zeros = elements(tensor)
        check_storage(x)
        if zeros:
            self._zeros[row] = zeros
        if x.is_complex():
            return of_complex(x)
        if x.device.type in NO_FLOAT64:
            x = x.cpu()
        x = flat(x)
        return None if self.add_small(row, x, x.numel()) else self._alone(row, x)

    def _alone(self, row: int, x: Tensor) -> Moments | None:
        """Return the state of a flat real tensor, or None if it is yet to be transferred."""
        if x.is_cpu or x.numel() == 0:
            return on_cpu(x)
        states = torch.stack([exact(chunk) for chunk in x.split(_DEVICE_CHUNK)])
        self._add_states([row] * len(states), states)
        return None

    def add_small(self, row: int, x: Tensor, n: int) -> bool:
        """Return whether a contiguous tensor is small, and is or will be read with others.

        Args:
            n: the number of its elements, or -1 if it cannot be read with others.
        """
        if not 0 < n <= MAX_NUMEL_DEVICE:
            return False
        is_cpu = x.is_cpu
        key = x.dtype if is_cpu else (x.dtype, x.device)
        group = self._small.get(key)
        if group is None:
            if not is_cpu and (x.is_meta or x.device.type in NO_FLOAT64):
                return False
            group = self._small[key] = Group(is_cpu)
        if n > group.max_numel:
            return False
        if group.numel + n > group.capacity:
            self._read_together(group)
        group.rows.append(row)
        group.tensors.append(x if x.dim() == 1 else x.view(-1))
        group.numel += n
        return True

    def _read_together(self, group: Group) -> None:
        """Read the tensors of a group together, or one by one if that raises."""
        for rows, tensors in group.take():
            try:
                if group.is_cpu:
                    self._read_on_cpu(rows, tensors)
                else:
                    self._add_states(rows, states_on_device(tensors))
            except Exception:
                for row, x in zip(rows, tensors, strict=True):
                    self.read_alone(row, x)

    def _read_on_cpu(self, rows: Sequence[int], tensors: Sequence[Tensor]) -> None:
        states = states_on_cpu(tensors)
        if len(rows) <= _FEW:
            for row, x, state in zip(rows, tensors, states.tolist(), strict=True):
                n, zeros, _, _, _, mean, m2, low, high = state
                if math.isfinite(m2):
                    self.write(row, (int(n), int(zeros), 0, 0, 0, mean, m2, low, high))
                else:
                    self._write_exact(row, x)
            return
        words = states[:, :5].to(torch.int64).view(torch.float64)
        table = torch.frombuffer(self.table, dtype=torch.float64).view(-1, states.shape[1])
        index = torch.frombuffer(array("q", rows), dtype=torch.int64)
        table.index_copy_(0, index, torch.cat((words, states[:, 5:]), 1))
        for i in states[:, _M2].isfinite().logical_not().nonzero().view(-1).tolist():
            self._write_exact(rows[i], tensors[i])

    def _write_exact(self, row: int, x: Tensor) -> None:
        """Write the state of a tensor for which the operators of `states_on_cpu` do not suffice."""
        self.write(row, from_row(exact(x).tolist()))

    def _add_states(self, rows: Sequence[int], states: Tensor) -> None:
        all_rows, all_states = self._on_device.setdefault(states.device, ([], []))
        all_rows += rows
        all_states.append(states)

    def finish(
        self, details: Mapping[torch.device, Sequence[tuple[int, Words]]]
    ) -> tuple[Transfer, ...]:
        """Read what was collected, and return the transfers that complete the table.

        They also bring `details` to the CPU.
        """
        for group in self._small.values():
            self._read_together(group)
        transfers = []
        for device, (rows, states) in self._on_device.items():
            zeros = [(row, self._zeros.pop(row, 0)) for row in rows]
            transfers.append(Pending(device, zeros, states, details.get(device, ())))
        table = bytes(self.table)
        for row, count in self._zeros.items():
            self.write(row, merge(constant(count, 0.0), moments.row(table, row)))
        return tuple(transfers)
