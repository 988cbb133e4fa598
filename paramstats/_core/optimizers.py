"""`Plan`: which tensors of optimizers are read, and what the updates are computed from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paramstats._core.details import Details, moved
from paramstats._core.elements import gradient
from paramstats._core.layout import Layout
from paramstats._core.moments import ABSENT_ROW, ROW, Moments, constant, unread
from paramstats._core.optimizer_record import MOMENTA, OptimizerRecord
from paramstats._core.optimizer_state import (
    decoupled_decay,
    entries_of,
    numbers_of,
    state_by_parameter,
    unwrapped,
    uses_formula,
)
from paramstats._core.torch_private import without_modes
from paramstats._core.updates import DIFFERENCE, FORMULA, NONE, ROWS, Update

VARIANCES = ("max_exp_avg_sq", "exp_avg_sq")
"""Keys of Adam's second moment; that of AMSGrad is the one that it divides by."""

_NO_PARAMETERS: frozenset[int] = frozenset()


class Request(NamedTuple):
    """What `summarize` reads of optimizers.

    Args:
        optimizers: the optimizers, without wrappers; none: only some of the tensors are read.
        copies: copies of parameters from before the step, by the id of the parameter.
        idle: ids of the parameters that had no gradient before the step that the optimizers have
            just made. None: it is not known which parameters the last step changed.
        no_formula: ids of parameters whose update must not be computed from Adam's state.
        only: ids of the tensors to read; None: all.
    """

    optimizers: tuple[torch.optim.Optimizer, ...]
    copies: Mapping[int, Tensor] = MappingProxyType({})
    idle: frozenset[int] | None = None
    no_formula: frozenset[int] = _NO_PARAMETERS
    only: frozenset[int] | None = None

    def select(self, layout: Layout, tensors: list[Any]) -> tuple[Layout, list[Any]]:
        """Return the tensors to read and their layout."""
        if self.only is None:
            return layout, tensors
        rows = [row for row, tensor in enumerate(tensors) if id(tensor) in self.only]
        return layout.take(rows), [tensors[row] for row in rows]


def make_request(optimizer: Any, function: str = "summarize") -> Request:
    """Return the request for an optimizer or several.

    Raises TypeError for anything else.
    """
    if isinstance(optimizer, Request):
        return optimizer
    several = [optimizer] if hasattr(optimizer, "param_groups") else optimizer
    try:
        found = tuple(dict.fromkeys(map(unwrapped, several)))
    except TypeError:
        found = ()
    if not found or not all(hasattr(one, "param_groups") for one in found):
        raise TypeError(
            f"paramstats.{function}: expected a torch.optim.Optimizer or several for optimizer, "
            f"got {optimizer!r}"
        )
    return Request(found)


def no_parameters(function: str) -> ValueError:
    """Return the error for an optimizer that has no parameter of the source."""
    return ValueError(
        f"paramstats.{function}: expected an optimizer of these parameters, got one that has none "
        f"of them; pass the model itself, and the optimizer that was created for it"
    )


class Plan:
    """The tensors to read for a layout's parameters and their optimizers, and where they belong.

    Attributes:
        tensors: the parameters and buffers, then the tensors of the optimizers' state.
        updates: the updates, whose operands are rows of a table of `tensors`.
        keys: the keys of the state, in columns 0, 1, ...
        places: the parameter and the column of each tensor of the state.
        numbers: the parameter, the column and the value of each number of the state.
        update_rows: the parameter of each update.
        unchanged: the parameters that the last step did not change.
        hyperparameters, methods: as in `OptimizerRecord`. Parameters of a group share a mapping.
    """

    @without_modes()
    def __init__(
        self, request: Request, layout: Layout, tensors: Sequence[Any], params: bool, grads: bool
    ) -> None:
        """Make a plan.

        Args:
            request: the optimizers.
            layout, tensors: the parameters and buffers.
            params, grads: whether their own rows are part of the record.

        Raises:
            ValueError: the optimizers have none of the parameters.
        """
        self._layout, self._reads_params = layout, params
        self.tensors = list(tensors)
        self.updates: list[Update] = []
        self._columns: dict[str, int] = {}
        self.places: list[tuple[int, int]] = []
        self.numbers: list[tuple[int, int, float]] = []
        self.update_rows: list[int] = []
        self.unchanged: list[int] = []
        self.hyperparameters: list[Mapping[str, float] | None] = [None] * len(layout)
        self.methods = [""] * len(layout)
        found = self._find(request, {id(tensor): row for row, tensor in enumerate(tensors)})
        if not found and request.only is None and request.idle is None:
            raise no_parameters("summarize")
        n = len(self.tensors)
        for row, group, state, optimizer in found:
            self._add_update(request, row, group, state, optimizer, n, grads)

    def _find(self, request: Request, rows: dict[int, int]) -> list[tuple[int, Any, Any, Any]]:
        """List the state of all parameters that are among `rows`, by their id."""
        found = []
        for optimizer in request.optimizers:
            state_of = state_by_parameter(optimizer)
            for group in optimizer.param_groups:
                hyperparameters = numbers_of(group)
                for param in group["params"]:
                    row = rows.pop(id(param), None)  # a parameter of two optimizers counts once
                    if row is None:
                        continue
                    self.hyperparameters[row] = hyperparameters
                    places: dict[str, int | float] = {}
                    for key, value in entries_of(state_of.get(param) or {}).items():
                        places[key] = self._add_state(row, key, value)
                    found.append((row, group, places, optimizer))
        return found

    def _add_state(self, row: int, key: str, value: Any) -> int | float:
        """Add an entry of the state; return its position in `tensors`, or a number as a float."""
        number = self._columns.setdefault(key, len(self._columns))
        if isinstance(value, Tensor):
            self.places.append((row, number))
            self.tensors.append(value)
            return len(self.tensors) - 1
        self.numbers.append((row, number, float(value)))
        return float(value)

    def _add_update(
        self,
        request: Request,
        row: int,
        group: Mapping[str, Any],
        state: Mapping[str, int | float],
        optimizer: Any,
        n: int,
        grads: bool,
    ) -> None:
        param = self.tensors[row]
        old, has_gradient = request.copies.get(id(param)), gradient(param) is not None
        if old is None and not has_gradient and id(param) in (request.idle or ()):
            self.unchanged.append(row)
            self.methods[row] = "no gradient"
            return

        def place(keys: Iterable[str]) -> int:
            places = (x for key in keys if isinstance(x := state.get(key), int))
            return next((x for x in places if self.tensors[x].shape == param.shape), -1)

        momentum, variance = place(MOMENTA), place(VARIANCES)
        grad = n + row if grads and has_gradient else -1
        step = state.get("step", 0.0)
        known = self.hyperparameters[row] or {}
        if not step or not {"beta2", "eps"} <= known.keys():
            variance = -1
        method = NONE
        if old is not None:
            method = DIFFERENCE
        elif (
            uses_formula(optimizer, group, known)
            and id(param) not in request.no_formula
            and min(momentum, variance) >= 0
            and has_gradient
        ):
            method = FORMULA
        if method == NONE and (grad < 0 or max(momentum, variance) < 0):
            return
        self.methods[row] = ("", "formula", "copy")[method]
        step_row, step = (step, 0.0) if isinstance(step, int) else (-1, step)
        decay = decoupled_decay(optimizer, group, known)
        lr, beta1, beta2, eps = (known.get(key, 0.0) for key in ("lr", "beta1", "beta2", "eps"))
        operands = row, grad, momentum, variance, step_row, old, method
        self.updates.append(Update(*operands, lr, decay, beta1, beta2, eps, step))
        self.update_rows.append(row)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._columns)

    def row_name(self, row: int) -> str:
        """Return the name of a row of the table, for errors."""
        n, names = len(self.tensors), self._layout.names
        if row >= 2 * n:
            return f"{names[self.update_rows[(row - 2 * n) // len(ROWS)]]} (update)"
        suffix = " (gradient)" if row >= n else ""
        row %= n
        if row < len(names):
            return names[row] + suffix
        row, key = self.places[row - len(names)]
        return f"{names[row]} ({self.keys[key]})"

    def own_details(self, details: Details) -> Details:
        """Return the details of the parameters and buffers, by their rows in their own table."""
        n, all_of_them = len(self._layout), len(self.tensors)
        params = range(n) if self._reads_params else [-1] * n
        return moved(details, [*params, *range(all_of_them, all_of_them + n)])

    def split(self, table: bytes) -> tuple[bytes, OptimizerRecord]:
        """Return the table of the parameters and buffers, and the record of the optimizers."""
        size, n, all_of_them = ROW.size, len(self._layout), len(self.tensors)

        def rows(begin: int, end: int) -> bytes:
            return table[begin * size : end * size]

        own = rows(0, n) if self._reads_params else _unread(table, n)
        out = bytearray(ABSENT_ROW * (n * (len(ROWS) + len(self.keys))))

        def put(column: int, row: int, state: bytes) -> None:
            begin = (column * n + row) * size
            out[begin : begin + size] = state

        for u, row in enumerate(self.update_rows):
            for k in ROWS:
                at = 2 * all_of_them + len(ROWS) * u + k
                put(k, row, rows(at, at + 1))
        for row in self.unchanged:
            count = Moments._make(ROW.unpack_from(table, row * size)).count
            put(0, row, ROW.pack(*constant(count, 0.0)))
        for at, (row, key) in enumerate(self.places, n):
            put(len(ROWS) + key, row, rows(at, at + 1))
        for row, key, value in self.numbers:
            put(len(ROWS) + key, row, ROW.pack(*constant(1, value)))
        fields = (self.keys, bytes(out), tuple(self.hyperparameters), tuple(self.methods))
        return own + rows(all_of_them, all_of_them + n), OptimizerRecord(*fields)


def _unread(table: bytes, n: int) -> bytes:
    """Return the first n rows with their counts only."""
    states = ROW.iter_unpack(table[: n * ROW.size])
    return b"".join(ROW.pack(*unread(state[0])) for state in states)
