"""`OptimizerRecord`: the updates of parameters and the state of their optimizers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from paramstats._core import moments
from paramstats._core.backend import active
from paramstats._core.moments import ABSENT_ROW, ROW, Moments, State
from paramstats._core.updates import ROWS

MOMENTA = ("exp_avg", "momentum_buffer", "momentum", "exp_moving_average")
"""Keys of a first moment; the first one that a parameter has is compared with its gradient."""


class OptimizerRecord(NamedTuple):
    """What a record knows of the optimizers of its tensors.

    `table` has a column of N rows of `Moments` for each of `updates.ROWS`, then for each key of the
    optimizers' state. A row is absent where a parameter has none.
    """

    keys: tuple[str, ...]
    """The keys of the state, such as "exp_avg" and "step"."""
    table: bytes
    hyperparameters: tuple[Mapping[str, float] | None, ...]
    """Those of each parameter's group, such as "lr"; None where no optimizer has the parameter."""
    methods: tuple[str, ...]
    """How each update was found: "formula", "copy", "no gradient", or "" without an update."""

    def state(self, column: int, row: int) -> Moments:
        """Return the state of a row of a column."""
        return moments.row(self.table, self.position(column, row))

    def column_states(self, column: int) -> list[State]:
        """Return the fields of `Moments` of all rows of a column."""
        begin, end = (self.position(column, row) * ROW.size for row in (0, len(self.methods)))
        return list(ROW.iter_unpack(self.table[begin:end]))

    def position(self, column: int, row: int) -> int:
        """Return the position of a row of a column in the table."""
        return column * len(self.methods) + row

    def packed(self, column: int, row: int) -> bytes:
        """Return a row of a column as bytes."""
        begin = self.position(column, row) * ROW.size
        return self.table[begin : begin + ROW.size]

    def column(self, key: str) -> int | None:
        """Return the column of a key of the state; None if no parameter has it."""
        return len(ROWS) + self.keys.index(key) if key in self.keys else None

    def has(self, column: int, row: int) -> bool:
        """Return whether a row of a column is not absent."""
        return not moments.is_absent(self.table, self.position(column, row))

    def momentum(self, row: int, count: int) -> str | None:
        """Return the key of the momentum of a parameter of `count` elements; None without one."""
        for key in MOMENTA:
            column = self.column(key)
            if column is not None and self.state(column, row).count == count:
                return key
        return None

    def take(self, rows: Sequence[int]) -> OptimizerRecord:
        """Return the record of these parameters."""
        return pick([(self, row) for row in rows], self.keys)

    def identity(self, row: int) -> tuple[object, ...]:
        """Return the key that equality of a parameter's statistics compares."""
        keys, table, (numbers,), (method,) = self.take([row])
        return keys, table, method, None if numbers is None else tuple(sorted(numbers.items()))

    def merged(self, groups: Sequence[Sequence[int]]) -> OptimizerRecord:
        """Return a record with one row for each group of parameters, merged from their rows."""
        ends = list(itertools.accumulate(map(len, groups), initial=0))
        grouped = self.take([row for group in groups for row in group])
        size = ends[-1] * ROW.size
        states = []
        for column in range(len(ROWS) + len(self.keys)):
            table = grouped.table[column * size : (column + 1) * size]
            for i in range(len(groups)):
                # As gradients, of which merge_rows makes an absent row if all are absent.
                states.append(active().merge_rows(table + table, *ends[i : i + 2])[ROW.size :])
        return self._replace(
            table=b"".join(states),
            hyperparameters=tuple(_common([self.hyperparameters[r] for r in g]) for g in groups),
            methods=tuple(
                " and ".join(sorted({self.methods[r] for r in g} - {""})) for g in groups
            ),
        )


def pick(places: Sequence[tuple[OptimizerRecord, int]], keys: tuple[str, ...]) -> OptimizerRecord:
    """Return the record of parameters that are rows of several records.

    Args:
        places: the record and the row of each parameter.
        keys: the keys of the state that the result has.
    """
    columns: list[list[bytes]] = [[] for _ in range(len(ROWS) + len(keys))]
    for record, row in places:
        same = record.keys == keys
        for number, column in enumerate(columns):
            of_record: int | None = number
            if not same and number >= len(ROWS):
                of_record = record.column(keys[number - len(ROWS)])
            column.append(ABSENT_ROW if of_record is None else record.packed(of_record, row))
    return OptimizerRecord(
        keys,
        b"".join(itertools.chain.from_iterable(columns)),
        tuple(record.hyperparameters[row] for record, row in places),
        tuple(record.methods[row] for record, row in places),
    )


def _common(several: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    """Return the hyperparameters that are equal in all groups; None if there is no group."""
    groups = [group for group in several if group is not None]
    if not groups:
        return None
    first = groups[0].items()
    return {key: value for key, value in first if all(g.get(key) == value for g in groups)}
