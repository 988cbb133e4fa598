"""Partial tensors: addends on several processes, added up before anybody reads them.

Every process tells which addends it has; what is to be added up follows from what all have told,
never from what one of them has met. One all_reduce in the exchange's own group for each operator
and type makes the elements of all of them, of copies once; a process without an addend takes part
with what changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from paramstats._sharded.merging import word_for

Label = tuple[str, bool]
"""A tensor's first name, and whether it is its gradient that is meant."""


class Addends(NamedTuple):
    """How the processes' addends of a DTensor belong together, told from its placements."""

    operator: str
    """Of `_OPERATORS`."""
    divisor: int
    processes: int
    """Those with addends of the same elements."""
    replica: tuple[int, ...]
    """Which copy of these elements: coordinates, then a number that stands for the mesh."""


class Addend(NamedTuple):
    """What a process tells of its own."""

    addends: Addends
    dtype: torch.dtype
    numel: int
    key: int
    """Which part of the whole tensor."""


Told = tuple[tuple[Label, Addend], ...]
"""By one process, in order."""


class _Operator(NamedTuple):
    reduce: Any
    neutral: Callable[[torch.dtype], float]


_OPERATORS = {
    "sum": _Operator(dist.ReduceOp.SUM, lambda dtype: 0),
    "product": _Operator(dist.ReduceOp.PRODUCT, lambda dtype: 1),
    "max": _Operator(
        dist.ReduceOp.MAX,
        lambda dtype: -torch.inf if dtype.is_floating_point else torch.iinfo(dtype).min,
    ),
    "min": _Operator(
        dist.ReduceOp.MIN,
        lambda dtype: torch.inf if dtype.is_floating_point else torch.iinfo(dtype).max,
    ),
}

_ADDED_UP_IN = {
    torch.float64: torch.float64,
    **dict.fromkeys(
        (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
        torch.float32,
    ),
    **dict.fromkeys(
        (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool), torch.int64
    ),
}


def addends_of(spec: Any, coordinate: Sequence[int]) -> Addends | str | None:
    """None where a DTensor's spec has nothing partial; a reason where it cannot be added up."""
    operators, divisor, processes = set(), 1, 1
    replica = []
    for dim, placement in enumerate(spec.placements):
        if placement.is_replicate():
            replica.append(coordinate[dim])
        elif placement.is_partial():
            kind = type(placement).__name__
            operator = placement.reduce_op if kind == "Partial" else kind
            size = spec.mesh.size(dim)
            processes *= size
            if operator == "avg":
                operator, divisor = "sum", divisor * size
            operators.add(operator)
    if not operators:
        return None
    if len(operators) > 1 or not operators <= _OPERATORS.keys():
        return f"partial by {', '.join(sorted(map(str, operators)))}, which is not added up"
    replica.append(word_for((tuple(spec.mesh.shape), spec.mesh.mesh.flatten().tolist())))
    return Addends(operators.pop(), divisor, processes, tuple(replica))


def added_up_in(dtype: torch.dtype, addends: Addends) -> torch.dtype | None:
    """None: addends of this type are not added up."""
    found = _ADDED_UP_IN.get(dtype)
    if addends.divisor > 1 and (found is None or not found.is_floating_point):
        return None
    return found


def digest_of(told: Told) -> int:
    """0 where nothing was told."""
    return word_for(told) if told else 0


class Slot(NamedTuple):
    """A part of a tensor in the buffer of its operator and type."""

    label: Label
    key: int
    replica: tuple[int, ...]
    """Whose addends are taken."""
    bucket: tuple[str, torch.dtype]
    begin: int
    numel: int
    divisor: int
    missing: int
    """Addends that no process has told of."""


class Plan(NamedTuple):
    """The same on all processes."""

    slots: tuple[Slot, ...]
    sizes: dict[tuple[str, torch.dtype], int]


def plan(told: Sequence[Told]) -> Plan:
    """From what each process has told, in order.

    Raises:
        ValueError: it does not go together.
    """
    by_label: dict[Label, list[Addend]] = {}
    for rows in told:
        for label, addend in rows:
            by_label.setdefault(label, []).append(addend)
    slots: list[Slot] = []
    sizes: dict[tuple[str, torch.dtype], int] = {}
    for label, addends in sorted(by_label.items()):
        kinds = {(a.addends.operator, a.addends.divisor, a.dtype) for a in addends}
        if len(kinds) > 1:
            raise _conflict(label, "partial in one way on all processes, got several")
        operator, divisor, dtype = kinds.pop()
        parts: dict[int, list[Addend]] = {}
        for addend in addends:
            parts.setdefault(addend.key, []).append(addend)
        for key, same in sorted(parts.items()):
            replica = same[0].addends.replica
            taken = [a for a in same if a.addends.replica == replica]
            numels = {a.numel for a in taken}
            if len(numels) > 1:
                raise _conflict(label, f"of one size, got addends of {sorted(numels)} elements")
            bucket, numel = (operator, dtype), numels.pop()
            begin = sizes.get(bucket, 0)
            missing = same[0].addends.processes - len(taken)
            slots.append(Slot(label, key, replica, bucket, begin, numel, divisor, missing))
            sizes[bucket] = begin + numel
    return Plan(tuple(slots), sizes)


def _conflict(label: Label, expected: str) -> ValueError:
    name = f"{label[0]} (gradient)" if label[1] else label[0]
    return ValueError(f"paramstats.summarize: expected '{name}' to be {expected}")


def add_up(
    plan: Plan,
    mine: dict[Label, Addend],
    values: dict[Label, Tensor],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> list[Tensor]:
    """The elements of each slot. Nothing in here depends on one process alone but values."""
    buffers = {}
    for bucket, size in plan.sizes.items():
        operator, dtype = bucket
        neutral = _OPERATORS[operator].neutral(dtype)
        buffers[bucket] = torch.full((size,), neutral, dtype=dtype, device=device)
    parts = [buffers[slot.bucket][slot.begin : slot.begin + slot.numel] for slot in plan.slots]
    for slot, part in zip(plan.slots, parts, strict=True):
        own = mine.get(slot.label)
        if own is not None and (own.key, own.addends.replica) == (slot.key, slot.replica):
            part.copy_(values[slot.label])
    if group is not None:
        for (operator, _), buffer in buffers.items():
            dist.all_reduce(buffer, _OPERATORS[operator].reduce, group)
    for slot, part in zip(plan.slots, parts, strict=True):
        if slot.divisor > 1:
            part /= slot.divisor
    return parts
