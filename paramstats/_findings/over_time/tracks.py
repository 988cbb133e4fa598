"""What a `Monitor` remembers of every parameter: torch tensors of one row per parameter.

All operators are on the CPU and in float64. Callers hide them from the user's modes and compute in
inference mode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from paramstats._core.backend import active
from paramstats._core.layout import Layout
from paramstats._core.moments import ROW, Statistics
from paramstats._core.record import Record
from paramstats._core.updates import UPDATE
from paramstats._findings.context import is_weight_shape
from paramstats._findings.structure import usual_norm

WINDOW = 16
"""The number of latest entries that an entry is compared with."""

_COLUMNS = len(Statistics._fields)
STAT = {name: column for column, name in enumerate(Statistics._fields)}
NAN = math.nan

_NUMBERS = {
    "entries": 0.0,  # entries with this parameter
    "last_step": NAN,
    "first_norm": NAN,  # of the parameter, the first one above zero
    "upper": NAN,  # the norms of the parameter above and below which it has grown or shrunk
    "lower": NAN,
    "samples": 0.0,  # entries in the window of gradients since the beginning
    "not_zero": 0.0,  # entries with a gradient that is not zero
    "with_grad": 0.0,  # entries with a gradient, zero or not
    "delta": NAN,  # the last change of the log norm of the gradient
    "noise": NAN,  # a moving average of how much that differs from the one before
    "onset": NAN,  # the step at which the gradient left its past
    "past": NAN,  # the median of the log norms of the gradient before that
    "spread": NAN,  # their median absolute deviation
    "away": 0.0,  # entries since then
    "largest_update": 0.0,  # the largest norm of an update / that of the parameter or of a new one
}

SUMS = N, X, Y, XX, XY, YY = range(6)
"""Sums for the line through (log of the number of steps, log norm of the gradient)."""


def float64(x: object) -> Tensor:
    """Return numbers as a float64 tensor on the CPU."""
    return torch.tensor(x, dtype=torch.float64, device="cpu")


def full(shape: tuple[int, ...], x: float) -> Tensor:
    """Return a float64 tensor on the CPU whose elements are all `x`."""
    return torch.full(shape, x, dtype=torch.float64, device="cpu")


class Plan(NamedTuple):
    """What depends on the layout alone."""

    names: tuple[str, ...]
    """The parameters, which are the first rows of the layout."""
    slots: Tensor
    """The row of the state for each of them."""
    is_in_order: bool
    """Whether it is the same row."""
    trainable: Tensor
    weights: Tensor
    """Whether it has two or more dimensions longer than one."""
    precise_weights: Tensor
    """Whether it is a weight, and its dtype has the precision of float32 or more."""
    n_weights: int
    usual_norm: Tensor
    """The norm of a new weight of this shape; see `structure.usual_norm`."""
    is_precise: Tensor
    """Whether the dtype has the precision of float32 or more."""


_PRECISE = frozenset({torch.float32, torch.float64, torch.complex64, torch.complex128})


def make_plan(layout: Layout, slots: dict[str, int]) -> Plan:
    """Return the plan of a layout; adds new names to `slots`."""
    n = layout.parameters
    names, shapes = layout.names[:n], layout.shapes[:n]
    rows = [slots.setdefault(name, len(slots)) for name in names]
    weights = [s is not None and 0 not in s and is_weight_shape(s) for s in shapes]
    norms = [usual_norm(s) if w and s else 0.0 for s, w in zip(shapes, weights, strict=True)]
    precise = [dtype in _PRECISE for dtype in layout.dtypes[:n]]
    both = [a and b for a, b in zip(weights, precise, strict=True)]
    return Plan(
        names,
        torch.tensor(rows, dtype=torch.int64, device="cpu"),
        rows == list(range(n)),
        torch.tensor(layout.requires_grad[:n], dtype=torch.bool, device="cpu"),
        torch.tensor(weights, dtype=torch.bool, device="cpu"),
        torch.tensor(both, dtype=torch.bool, device="cpu"),
        sum(weights),
        float64(norms),
        torch.tensor(precise, dtype=torch.bool, device="cpu"),
    )


class State:
    """A row for every parameter that any entry had, in the order of appearance."""

    def __init__(self, conditions: int) -> None:
        self.slots: dict[str, int] = {}
        self._plans: dict[Layout, Plan] = {}
        self.numbers = {name: full((0,), start) for name, start in _NUMBERS.items()}
        self.value = full((0, _COLUMNS), NAN)
        """The statistics of the parameter in its previous entry."""
        self.grad = full((0, _COLUMNS), NAN)
        """Those of its gradient."""
        self.grads = full((0, WINDOW), NAN)
        """Log norms of the gradient in the latest entries, in the order of a ring."""
        self.norms = full((0, 2, WINDOW), NAN)
        """Norms of the parameter in the latest entries and their steps, in such an order."""
        self.sums = full((0, len(SUMS)), 0.0)
        self.conditions = full((0, conditions, 4), 0.0)

    def plan(self, layout: Layout) -> Plan:
        plan = self._plans.get(layout)
        if plan is None:
            if len(self._plans) >= 16:
                self._plans.clear()
            plan = self._plans[layout] = make_plan(layout, self.slots)
            self._grow()
        return plan

    def _grow(self) -> None:
        new = len(self.slots) - len(self.value)
        if not new:
            return
        for name, start in _NUMBERS.items():
            self.numbers[name] = torch.cat([self.numbers[name], full((new,), start)])
        for name, start in _TABLES.items():
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, full((new, *old.shape[1:]), start)]))

    def read(self, plan: Plan) -> Rows:
        """Return the rows of the parameters of an entry, for `write`."""
        parts = *self.numbers.values(), *(getattr(self, name) for name in _TABLES)
        if not self._is_all(plan):
            parts = tuple(x[plan.slots] for x in parts)
        k = len(_NUMBERS)
        return Rows(dict(zip(_NUMBERS, parts[:k], strict=True)), *parts[k:])

    def write(self, plan: Plan, rows: Rows) -> None:
        """Replace the rows of the parameters of an entry."""
        is_all = self._is_all(plan)

        def put(old: Tensor, new: Tensor) -> Tensor:
            return new if is_all else old.index_copy(0, plan.slots, new)

        for name, new in rows.numbers.items():
            self.numbers[name] = put(self.numbers[name], new)
        for name in _TABLES:
            setattr(self, name, put(getattr(self, name), getattr(rows, name)))

    def _is_all(self, plan: Plan) -> bool:
        return plan.is_in_order and len(plan.names) == len(self.slots)


_TABLES = {"value": NAN, "grad": NAN, "grads": NAN, "norms": NAN, "sums": 0.0, "conditions": 0.0}
"""The tables of `State`, and the content of a new row."""


@dataclass
class Rows:
    """The rows of the state for the parameters of one entry; rules replace the tensors."""

    numbers: dict[str, Tensor]
    value: Tensor
    grad: Tensor
    grads: Tensor
    norms: Tensor
    sums: Tensor
    conditions: Tensor


def updates_of(record: Record) -> Tensor | None:
    """Return the statistics of the last updates, NaN where they are not known; None if nowhere."""
    optimizer, n = record.optimizer, record.layout.parameters
    if optimizer is None or not n:
        return None
    begin, end = (optimizer.position(UPDATE, row) * ROW.size for row in (0, n))
    table = active().finalize_table(optimizer.table[begin:end], record.correction, 1.0)
    return torch.frombuffer(bytearray(table), dtype=torch.float64).view(n, _COLUMNS)


def statistics(record: Record) -> tuple[Tensor, Tensor]:
    """Return the statistics of all parameters and of their gradients, [parameters, statistics]."""
    if not record.table:
        return full((0, _COLUMNS), NAN), full((0, _COLUMNS), NAN)
    table = torch.frombuffer(bytearray(record.statistics()), dtype=torch.float64)
    values, grads = table.view(2, len(record.layout), _COLUMNS)
    n = record.layout.parameters
    return values[:n], grads[:n]
