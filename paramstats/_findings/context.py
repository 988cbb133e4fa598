"""The input of the rules of the health check: all tensors, and properties of the whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from paramstats._core.backend import active
from paramstats._core.entries import Entry, is_read
from paramstats._core.moments import ROW, STATISTICS_ROW, Statistics
from paramstats._core.record import Record
from paramstats._core.updates import UPDATE
from paramstats._findings.thresholds import Thresholds


class Context(NamedTuple):
    """The input of every rule, computed once per health check."""

    record: Record
    entries: Sequence[Entry]
    """All tensors of the record."""
    updates: Sequence[Statistics | None]
    """The last update of each entry; None where it is not known."""
    weights: Sequence[Entry]
    """Those that `is_weight` defines."""
    thresholds: Thresholds
    median_grad_norm: float
    """The median of the gradient norms of all weights; NaN if there are none."""
    has_trainable: bool
    """Whether any tensor requires a gradient. In a state_dict, none does."""
    has_gradients: bool
    has_zero_gates: bool
    """Whether a zero parameter that gets a gradient, such as LoRA B, blocks other gradients.

    After a step, whether one did so before it.
    """


def make_context(record: Record, thresholds: Thresholds, every: Sequence[Entry]) -> Context:
    """Return what the rules need to know of a record, whose entries are `every`."""
    weights = [entry for entry in every if is_weight(entry)]
    gradients = (entry.grad for entry in weights if entry.grad is not None)
    norms = sorted(grad.norm for grad in gradients if 0 < grad.norm < math.inf)
    updates = _updates(record)
    return Context(
        record,
        every,
        updates,
        weights,
        thresholds,
        median_grad_norm=norms[len(norms) // 2] if norms else math.nan,
        has_trainable=any(entry.requires_grad for entry in every),
        has_gradients=any(entry.grad is not None for entry in every),
        has_zero_gates=any(
            (is_zero_with_gradient(entry) or _was_zero(entry, update)) and not is_additive(entry)
            for entry, update in zip(every, updates, strict=True)
        ),
    )


def _updates(record: Record) -> list[Statistics | None]:
    """Return the statistics of the last update of each tensor of a record."""
    n, optimizer = len(record.layout), record.optimizer
    if optimizer is None:
        return [None] * n
    begin, end = (optimizer.position(UPDATE, row) * ROW.size for row in (0, n))
    table = active().finalize_table(optimizer.table[begin:end], record.correction, 1.0)
    rows = map(Statistics._make, STATISTICS_ROW.iter_unpack(table))
    return [row if is_read(row) else None for row in rows]


def is_weight(entry: Entry) -> bool:
    """Return whether two or more dimensions are longer than one.

    This excludes biases, the weights of normalization layers and class tokens.
    """
    return (
        entry.kind == "param"
        and entry.shape is not None
        and len(entry.shape) - entry.shape.count(0) - entry.shape.count(1) >= 2
    )


def is_zero_with_gradient(entry: Entry) -> bool:
    """Return whether all elements are zero and will change with the next step.

    Examples are LoRA B, and a last layer or a normalization weight that is initialized to zero.
    """
    return entry.value.zero_fraction == 1 and entry.grad is not None and entry.grad.norm > 0


def _was_zero(entry: Entry, update: Statistics | None) -> bool:
    """Return whether all elements were zero before the last step: the update equals the tensor.

    The update of a bfloat16 parameter may be known with the parameter's precision only.
    """
    if update is None or entry.grad is None or not entry.value.norm > 0:
        return False
    value = entry.value
    pairs = (value.norm, update.norm), (value.min, update.min), (value.max, update.max)
    return all(math.isclose(a, b, rel_tol=0.01) for a, b in pairs)


def is_additive(entry: Entry) -> bool:
    """Return whether it is a bias or a position table, by its name: zeros in it block nothing."""
    last_part = entry.name.rpartition(".")[2]
    return "bias" in last_part or "pos" in last_part


def nonfinite_elements(statistics: Statistics) -> str:
    """Return the number of elements of each non-finite value, such as "1 NaN of 4 elements"."""
    counts = [
        f"{count:,.0f} {name}"
        for count, name in (
            (statistics.nan_count, "NaN"),
            (statistics.pos_inf_count, "+Inf"),
            (statistics.neg_inf_count, "-Inf"),
        )
        if count
    ]
    return f"{', '.join(counts)} of {count_elements(statistics)}"


def count_elements(statistics: Statistics) -> str:
    """Return the number of elements in words."""
    return f"{statistics.count:,.0f} element{'s' if statistics.count != 1 else ''}"
