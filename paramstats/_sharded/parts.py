"""What an exchange sends of optimizers: their state, updates and hyperparameters, as rows.

These rows, the parts, follow those of the tensors and their gradients. A number is a row of one
element. The hyperparameters of a group are sent once, at the group's first parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from paramstats._core import moments
from paramstats._core.elements import gradient, numel
from paramstats._core.layout import Layout
from paramstats._core.moments import ABSENT_ROW, ROW, Moments, constant, finalize, unread
from paramstats._core.optimizer_record import OptimizerRecord
from paramstats._core.optimizers import Plan, Request
from paramstats._core.shard import LocalShard
from paramstats._core.updates import (
    GRAD_MOMENTUM,
    LAG,
    ROWS,
    UPDATE,
    UPDATE_GRAD,
    Update,
)
from paramstats._sharded.local_shards import LocalShards

_UPDATE_KEYS = ("update", "gradient * momentum", "update * gradient", "lag")
"""The keys of `updates.ROWS`."""

_METHODS = ("", "formula", "copy", "no gradient")
"""A method is sent as its position."""

_STATE, _UPDATE, _METHOD, _GROUP = range(4)
"""The kinds of parts."""


class Part(NamedTuple):
    """A row of an exchange that belongs to a parameter."""

    row: int
    """The parameter."""
    kind: int
    key: str
    """The key of the state or of the group, or one of `_UPDATE_KEYS`."""
    numel: int
    """Elements of the whole tensor."""


class Parts(NamedTuple):
    """The parts of a layout."""

    rows: tuple[Part, ...] = ()
    groups: tuple[int, ...] | None = None
    """The first parameter of each parameter's group, or -1; None if optimizers were not asked for.
    """

    def row_name(self, layout: Layout, row: int) -> str:
        """Return the name of a row: of a tensor, a gradient or a part."""
        if row < 2 * len(layout):
            return layout.row_name(row)
        part = self.rows[row - 2 * len(layout)]
        return f"{layout.names[part.row]} ({part.key})"

    def indexes(self, layout: Layout, other_layout: Layout, others: Parts) -> list[int]:
        """Return the index of each of `others`, which are among these."""
        found = {_key(layout, part): index for index, part in enumerate(self.rows)}
        return [found[_key(other_layout, part)] for part in others.rows]

    def record(self, layout: Layout, table: bytes) -> OptimizerRecord | None:
        """Return the record of the optimizers, if they were asked for.

        Args:
            layout: the layout of the parts.
            table: the states of the parts.
        """
        if self.groups is None:
            return None
        n, size = len(layout), ROW.size
        keys = tuple(dict.fromkeys(part.key for part in self.rows if part.kind == _STATE))
        columns = {(_UPDATE, key): k for k, key in enumerate(_UPDATE_KEYS)}
        columns |= {(_STATE, key): k for k, key in enumerate(keys, len(ROWS))}
        out = bytearray(ABSENT_ROW * (n * len(columns)))
        methods = [""] * n
        of_groups: dict[int, dict[str, float]] = {}
        for at, (row, kind, key, _) in enumerate(self.rows):
            column = columns.get((kind, key))
            if column is not None:
                begin = (column * n + row) * size
                out[begin : begin + size] = table[at * size : (at + 1) * size]
                continue
            number = finalize(moments.row(table, at), 0.0).mean
            if kind == _METHOD:
                methods[row] = _METHODS[int(number)]
            else:
                of_groups.setdefault(row, {})[key] = number
        hyperparameters = tuple(None if g < 0 else of_groups.get(g, {}) for g in self.groups)
        return OptimizerRecord(keys, bytes(out), hyperparameters, tuple(methods))


def refuse_slices(layout: Layout, tensors: Sequence[Any]) -> None:
    """Raise NotImplementedError if a tensor is a `LocalShard`, also in FSDP1 or ZeRO-3."""
    for name, x in zip(layout.names, tensors, strict=True):
        if isinstance(x, LocalShard):
            raise NotImplementedError(
                f"paramstats: expected plain tensors or DTensors with optimizer=, got a LocalShard "
                f"or a parameter of FSDP1 or ZeRO-3 for {name!r}; leave out optimizer=, or shard "
                f"the model with fully_shard (FSDP2)"
            )


def union_of(layout: Layout, several: Sequence[tuple[Layout, Parts]]) -> Parts:
    """Return the parts of several ranks in the layout of all tensors.

    Of a parameter's group and of the size of a part, those of the first rank count.
    """
    rows: dict[tuple[str, int, str], Part] = {}
    groups = [-1] * len(layout)
    for other, parts in several:
        index = [layout.index[name] for name in other.names]
        for part in parts.rows:
            rows.setdefault(_key(other, part), part._replace(row=index[part.row]))
        for row, group in enumerate(parts.groups or ()):
            if group >= 0 > groups[index[row]]:
                groups[index[row]] = index[group]
    is_asked = any(parts.groups is not None for _, parts in several)
    return Parts(tuple(rows.values()), tuple(groups) if is_asked else None)


def _key(layout: Layout, part: Part) -> tuple[str, int, str]:
    return layout.names[part.row], part.kind, part.key


class LocalParts:
    """The parts that this rank sends, and what it reads for them.

    Attributes:
        parts: the parts.
        updates: the updates, whose operands are rows of `LocalShards`, and the first of the four
            parts of each.
        states: the states of parts that are not read, by part.
        reasons: why a part cannot be read, by part.
    """

    def __init__(
        self,
        request: Request,
        layout: Layout,
        tensors: Sequence[Any],
        shards: LocalShards,
        grads: bool,
    ) -> None:
        """Find the parts, and add their shards to `shards`.

        Args:
            request: the optimizers.
            layout, tensors: the parameters and buffers: plain tensors and DTensors.
            shards: the shards of `tensors`.
            grads: whether to read gradients.

        Raises:
            NotImplementedError: a tensor is a `LocalShard`, also in a wrapper of FSDP1 or ZeRO-3.
            ValueError: the optimizers have none of the parameters.
        """
        refuse_slices(layout, tensors)
        self.updates: list[tuple[Update, int]] = []
        self.states: dict[int, Moments] = {}
        self.reasons: dict[int, str] = {}
        self._rows: list[Part] = []
        self._tensors, self._shards = tensors, shards
        self._first = 2 * len(tensors)  # the row of the first part in `shards`
        plan = Plan(request, layout, tensors, True, grads)
        for x, (row, key) in zip(plan.tensors[len(tensors) :], plan.places, strict=True):
            self._add_state(row, plan.keys[key], x)
        for row, key, value in plan.numbers:
            self._add_number(row, _STATE, plan.keys[key], value)
        groups = self._add_groups(plan)
        self._add_updates(plan)
        for row, hyperparameters in enumerate(plan.hyperparameters):
            if hyperparameters is not None:
                self._add_number(row, _METHOD, "method", _METHODS.index(plan.methods[row]))
        self.parts = Parts(tuple(self._rows), groups)

    def _add(self, part: Part, tensor: Tensor | None, index: int) -> int:
        """Add a part; return its position."""
        self._rows.append(part)
        self._shards.add(tensor, index)
        return len(self._rows) - 1

    def _add_number(self, row: int, kind: int, key: str, value: float) -> None:
        """Add a number, of which every rank has a replica."""
        self.states[self._add(Part(row, kind, key, 1), None, 0)] = constant(1, value)

    def _add_state(self, row: int, key: str, x: Any) -> None:
        """Add a tensor of the state of a parameter."""
        param, local = self._tensors[row], self._shards.tensors[row]
        assert local is not None
        part = len(self._rows)
        if hasattr(x, "_spec"):
            self._rows.append(Part(row, _STATE, key, numel(x)))
            self._shards.add_dtensor(x)
            if self._shards.reductions.pop(self._first + part, None) is not None:
                self._refuse(part, x._local_tensor, "partial tensors of a state are not reduced")
        elif not hasattr(param, "_spec") or x.dim() == 0 or x.shape == param.shape:
            self._add(Part(row, _STATE, key, numel(x)), x, 0)
        elif x.shape == local.shape:
            self._add(Part(row, _STATE, key, numel(param)), x, self._shards.indexes[row])
        else:
            self._add(Part(row, _STATE, key, numel(x)), x, 0)
            reason = f"a plain tensor of shape {tuple(x.shape)} in the state of a sharded parameter"
            self._refuse(part, x, reason)

    def _refuse(self, part: int, x: Tensor, reason: str) -> None:
        """Do not read a part."""
        self.states[part], self.reasons[part] = unread(numel(x)), reason
        self._shards.tensors[self._first + part] = None

    def _add_groups(self, plan: Plan) -> tuple[int, ...]:
        """Add the hyperparameters of each group; return the first parameter of each row's group."""
        first: dict[int, int] = {}
        groups = []
        for row, hyperparameters in enumerate(plan.hyperparameters):
            if hyperparameters is None:
                groups.append(-1)
                continue
            groups.append(first.setdefault(id(hyperparameters), row))
            if groups[row] == row:
                for key, value in hyperparameters.items():
                    self._add_number(row, _GROUP, key, value)
        return tuple(groups)

    def _add_updates(self, plan: Plan) -> None:
        """Add four rows for each parameter that an optimizer has, also if they are absent.

        So the ranks need not agree again when a parameter has no gradient.
        """
        updates = dict(zip(plan.update_rows, plan.updates, strict=True))
        unchanged = set(plan.unchanged)
        for row, hyperparameters in enumerate(plan.hyperparameters):
            if hyperparameters is None:
                continue
            param, local = self._tensors[row], self._shards.tensors[row]
            assert local is not None
            part = len(self._rows)
            size, index = numel(param), self._shards.indexes[row]
            for key in _UPDATE_KEYS:
                self._add(Part(row, _UPDATE, key, size), None, index)
            if row in unchanged:
                self.states[part + UPDATE] = constant(numel(local), 0.0)
            elif row in updates:
                self._add_update(plan, part, updates[row], local)

    def _add_update(self, plan: Plan, part: int, update: Update, local: Tensor) -> None:
        """Add an update, or say which of its rows cannot be computed from local elements."""
        param, n = plan.tensors[update.param], len(self._tensors)
        operands = [plan.tensors[at] for at in (update.momentum, update.variance) if at >= 0]
        operands += [] if update.old is None else [update.old]
        reason = ""
        if update.param in self._shards.reductions or param.is_complex():
            reason = "updates of partial and of complex parameters are not read"
        elif not all(_is_placed_as(x, param, local) for x in operands):
            reason = "the state or the copy has other placements than the parameter"
        grad = gradient(param) if update.grad >= 0 else None
        refused = tuple(ROWS) if reason else ()
        if grad is not None and not reason and not _is_placed_as(grad, param, local):
            placements = [tuple(getattr(x, "placements", ())) for x in (grad, param)]
            reason = "the gradient is placed as {}, the parameter as {}".format(*placements)
            refused = (GRAD_MOMENTUM, UPDATE_GRAD, LAG)
        for k, is_computed in enumerate(update.has_rows()):
            if is_computed and k in refused:
                self.states[part + k], self.reasons[part + k] = unread(numel(local)), reason
        if UPDATE in refused:
            plan.methods[update.param] = ""
            return
        if refused:
            update = update._replace(grad=-1)

        def row(at: int) -> int:
            """Return the row of `LocalShards` for a row of the plan."""
            if at >= len(plan.tensors):
                return n + at - len(plan.tensors)
            return at if at < n else n + at

        old = getattr(update.old, "_local_tensor", update.old)
        update = update.with_operands(map(row, update.operands()))._replace(old=old)
        self.updates.append((update, part))


def _is_placed_as(x: Any, param: Any, local: Tensor) -> bool:
    """Return whether the local elements of a tensor belong to those of a parameter, one by one.

    A plain tensor of the shape of the local elements, such as a copy of them, does.
    """
    spec, expected = getattr(x, "_spec", None), getattr(param, "_spec", None)
    if spec is None or expected is None:
        return spec is expected or x.shape == local.shape
    return spec is expected or (
        spec.placements == expected.placements and spec.mesh == expected.mesh
    )
