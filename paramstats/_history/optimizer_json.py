"""Write what a record knows of optimizers as a JSON object; parse and check such an object."""

from __future__ import annotations

import sys
from itertools import starmap
from typing import Any

from paramstats._core.moments import ABSENT, NAN, ROW, Moments, unread
from paramstats._core.optimizer_record import OptimizerRecord
from paramstats._core.updates import ROWS, UPDATE
from paramstats._history.state_columns import (
    COUNTS,
    Check,
    expect,
    from_columns,
    is_complex_state,
    json_text,
    list_of,
    to_columns,
)

_UPDATES = ("update", "grad_momentum", "update_grad", "lag")
"""The names of `updates.ROWS` in files."""

_UNUSED = (0.0, 0.0, 0.0)
"""m2, min and max of products, which have no meaning; other numbers after merging."""


def optimizer_text(record: OptimizerRecord, counts: list[int]) -> str:
    """Return the JSON object for a record; `counts` are the numbers of elements of its tensors."""
    columns: list[Any] = []
    for column in range(len(ROWS) + len(record.keys)):
        begin, end = (record.position(column + i, 0) * ROW.size for i in (0, 1))
        rows = list(ROW.iter_unpack(record.table[begin:end]))
        if _is_products(column) and all(row[6:] == _UNUSED or row[5] != row[5] for row in rows):
            rows = [(*row[:6], *_UNUSED) for row in rows]
        is_absent = all(row[0] == ABSENT for row in rows)
        columns.append(None if is_absent else to_columns(rows, counts, _defaults(column)))
    groups = {id(group): group for group in record.hyperparameters if group is not None}
    numbers = {group: number for number, group in enumerate(groups)}
    updates = zip(_UPDATES, columns, strict=False)
    content = {
        "groups": list(map(dict, groups.values())),
        "group": [numbers.get(id(group)) for group in record.hyperparameters],
        "methods": record.methods,
        "updates": {name: of_row for name, of_row in updates if of_row is not None},
        "state": dict(zip(record.keys, columns[len(ROWS) :], strict=True)),
    }
    return json_text(content)


def parse_optimizer(content: Any, counts: list[int]) -> OptimizerRecord:
    """Return the record in a parsed object; raises an error if a value is not valid.

    Args:
        content: the object.
        counts: the numbers of elements of the tensors.
    """
    expect(type(content) is dict, "an object for optimizer", content)
    updates, state = content["updates"], content["state"]
    for name, columns in (("updates", updates), ("state", state)):
        expect(type(columns) is dict, f"columns by name for {name}", columns)
    n, table = len(counts), []
    for column, of_row in enumerate((*map(updates.get, _UPDATES), *state.values())):
        states = [unread(ABSENT)] * n
        if of_row is not None:
            check = _CHECKS[min(column, len(ROWS))]
            states = from_columns(of_row, counts, ABSENT, [check] * n, _defaults(column))
            if _is_products(column):
                states = [unread(x.count) if x.mean != x.mean else x for x in states]
        table += states
    groups = [_group(group) for group in list_of(dict, content["groups"], "groups")]
    numbers = list_of(object, content["group"], "group", n)
    is_number = [x is None or (type(x) is int and 0 <= x < len(groups)) for x in numbers]
    expect(all(is_number), "the number of a group or null", numbers)
    return OptimizerRecord(
        tuple(map(sys.intern, state)),
        b"".join(starmap(ROW.pack, table)),
        tuple(None if x is None else groups[x] for x in numbers),
        tuple(map(sys.intern, list_of(str, content["methods"], "methods", n))),
    )


def _group(group: dict[str, Any]) -> dict[str, float]:
    expect(
        all(x is None or type(x) in (int, float) for x in group.values()),
        "numbers for hyperparameters",
        group,
    )
    return {sys.intern(key): NAN if x is None else float(x) for key, x in group.items()}


def _is_products(column: int) -> bool:
    return column in ROWS and column != UPDATE


def _defaults(column: int) -> tuple[str, ...]:
    """Return the columns of states that are zeros by default."""
    return (*COUNTS, "m2", "min", "max") if _is_products(column) else COUNTS


def _is_update(a: Moments) -> bool:
    """Return whether an update or products may have this state.

    An element may count as a zero and as not finite: a parameter that is infinite does not change.
    """
    _, zeros, *others = a[:5]
    counted = min(a[1:5]) >= 0 and max(zeros, sum(others)) <= max(a.count, 0)
    return counted and not a.m2 < 0


def _is_lag(a: Moments) -> bool:
    return _is_update(a) and not a.mean < 0


# A tensor of the state may be complex.
_CHECKS: tuple[Check, ...] = (_is_update, _is_update, _is_update, _is_lag, is_complex_state)
