"""The input of the rules of the health check: all tensors, and properties of the whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from paramstats._core.entries import Entry, is_read
from paramstats._core.moments import Statistics
from paramstats._core.record import Record
from paramstats._findings.thresholds import Thresholds


class Context(NamedTuple):
    """The input of every rule, computed once per health check."""

    record: Record
    entries: Sequence[Entry]
    """All tensors of the record, perhaps without the optimizers' state."""
    updates: Sequence[Statistics | None]
    """The last update of each entry; None where it is not known."""
    thresholds: Thresholds
    has_trainable: bool
    """Whether any tensor requires a gradient. In a state_dict, none does. False for a file."""
    has_gradients: bool
    has_zero_gates: bool
    """Whether a zero parameter that gets a gradient, such as LoRA B, blocks other gradients.

    After a step, whether one did so before it.
    """


def make_context(record: Record, thresholds: Thresholds, every: Sequence[Entry]) -> Context:
    """Return what the rules need to know of a record, whose entries are `every`."""
    return Context(
        record,
        every,
        updates=[u if (u := entry.update) is not None and is_read(u) else None for entry in every],
        thresholds=thresholds,
        has_trainable=record.file is None and any(record.layout.requires_grad),
        has_gradients=any(entry.grad is not None for entry in every),
        has_zero_gates=any(
            (is_zero_with_gradient(entry) or _was_zero(entry)) and not is_additive(entry)
            for entry in every
            if entry.grad is not None
        ),
    )


def is_weight(entry: Entry) -> bool:
    """Return whether two or more dimensions are longer than one.

    This excludes biases, the weights of normalization layers and class tokens.
    """
    return entry.kind == "param" and entry.shape is not None and is_weight_shape(entry.shape)


def is_weight_shape(shape: tuple[int, ...]) -> bool:
    """Return whether two or more dimensions are longer than one."""
    return len(shape) - shape.count(0) - shape.count(1) >= 2


def is_zero_with_gradient(entry: Entry) -> bool:
    """Return whether all elements are zero and will change with the next step.

    Examples are LoRA B, and a last layer or a normalization weight that is initialized to zero.
    """
    return entry.value.zero_fraction == 1 and entry.grad is not None and entry.grad.norm > 0


def _was_zero(entry: Entry) -> bool:
    """Return whether all elements were zero before the last step: the update equals the tensor.

    The update of a bfloat16 parameter may be known with the parameter's precision only.
    """
    value, update = entry.value, entry.update
    if update is None or not value.norm > 0 or update.norm < 0.9 * value.norm:
        return False
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
