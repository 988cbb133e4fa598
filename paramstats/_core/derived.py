"""Numbers that are derived from two tensors, for all tensors of a record.

They have the names of `Summary.scalars`, and the values of `ParamStats` and `OptimizerStats`.
"""

from __future__ import annotations

from collections.abc import Iterable

from paramstats._core.entries import statistics
from paramstats._core.moments import NAN, STATISTICS_ROW, Moments, Statistics
from paramstats._core.optimizer_record import MOMENTA, OptimizerRecord
from paramstats._core.record import Record
from paramstats._core.updates import (
    GRAD_MOMENTUM,
    LAG,
    UPDATE,
    UPDATE_GRAD,
    cosine,
    eps_fraction,
    ratio,
    root_mean,
)

_RATIO, _RMS, _EPS_FRACTION = "update_ratio", "optimizer_rms", "optimizer_eps_fraction"
_UPDATE_GRAD, _GRAD_MOMENTUM = "update_cosine_grad", "grad_cosine_"

DERIVED = (
    _RATIO,
    _UPDATE_GRAD,
    *(_GRAD_MOMENTUM + key for key in MOMENTA),
    _RMS,
    _EPS_FRACTION,
)
"""The names of all derived numbers."""

_COLUMNS = {_RATIO: UPDATE, _UPDATE_GRAD: UPDATE_GRAD, _RMS: LAG, _EPS_FRACTION: LAG}
"""The column that each is computed from. The cosines with a momentum have GRAD_MOMENTUM."""


def derived_names(record: Record) -> tuple[str, ...]:
    """Return the names of the derived numbers that a tensor of a record may have."""
    if record.optimizer is None:
        return ()
    missing = {_GRAD_MOMENTUM + key for key in set(MOMENTA) - set(record.optimizer.keys)}
    return tuple(name for name in DERIVED if name not in missing)


def derived(record: Record, name: str) -> list[float | None]:
    """Return a derived number of each tensor; None where what it is computed from was not read."""
    optimizer = record.optimizer
    if optimizer is None:
        return [None] * len(record.layout)
    column = _COLUMNS.get(name, GRAD_MOMENTUM)
    is_known = [optimizer.has(column, row) for row in range(len(record.layout))]
    values: Iterable[float]
    if name == _RATIO:
        pairs = zip(_decoded(record, "update"), _decoded(record, "param"), strict=True)
        values = [ratio(update.norm, param.norm) for update, param in pairs]
    elif name == _RMS:
        values = [root_mean(lag, record.grad_scale) for lag in _column(record, optimizer, column)]
    elif name == _EPS_FRACTION:
        values = map(eps_fraction, _column(record, optimizer, column))
    elif name == _UPDATE_GRAD:
        values = _cosines(record, optimizer, column, "update")
    else:
        key = name.removeprefix(_GRAD_MOMENTUM)
        is_known = [
            is_known[row] and optimizer.momentum(row, int(param.count)) == key
            for row, param in enumerate(_decoded(record, "param"))
        ]
        values = _cosines(record, optimizer, column, key)
    return [value if known else None for value, known in zip(values, is_known, strict=True)]


def _cosines(record: Record, optimizer: OptimizerRecord, column: int, kind: str) -> list[float]:
    """Return the cosines of gradients with the tensors of a kind."""
    rows = zip(
        _column(record, optimizer, column),
        _decoded(record, "grad"),
        _decoded(record, kind),
        strict=True,
    )
    return [
        cosine(products, grad.norm, other.norm, record.grad_scale)
        if products.count == grad.count == other.count
        else NAN
        for products, grad, other in rows
    ]


def _column(record: Record, optimizer: OptimizerRecord, column: int) -> list[Moments]:
    return [optimizer.state(column, row) for row in range(len(record.layout))]


def _decoded(record: Record, kind: str) -> list[Statistics]:
    """Return the statistics of all tensors; NaN where there are none."""
    return list(map(Statistics._make, STATISTICS_ROW.iter_unpack(statistics(record, kind))))
