"""Reduce partial tensors: DTensors whose value is the sum (or maximum, ...) of all ranks' values.

Every rank first sends the specs of its partial tensors. All ranks make the same plan from these
specs, so that they make the same collective calls: one all_reduce in the exchange's own group for
each operator and dtype. Of several replicas, one is reduced. A rank without a value contributes the
neutral element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from paramstats._sharded.collectives import Ranks
from paramstats._sharded.merging import hash_word

Label = tuple[str, bool]  # a tensor's first name, and whether its gradient is meant


class Reduction(NamedTuple):
    """How the ranks' values of a partial DTensor are reduced, as its placements say.

    `divisor` is the number of ranks for an average, else 1. `ranks` have a value of the same
    elements. `replica` has the mesh coordinates of the replica, then a hash of the mesh.
    """

    operator: str
    divisor: int
    ranks: int
    replica: tuple[int, ...]


Bucket = tuple[str, torch.dtype]  # an operator, and the dtype in which it is applied


class PartialSpec(NamedTuple):
    """A partial tensor of one rank."""

    reduction: Reduction
    dtype: torch.dtype
    numel: int
    shard_index: int


PartialSpecs = tuple[tuple[Label, PartialSpec], ...]
"""All partial tensors of one rank, sorted."""

_OPERATORS = {op: getattr(dist.ReduceOp, op.upper()) for op in ("sum", "product", "max", "min")}

_REDUCTION_DTYPES = {
    torch.float64: torch.float64,
    **dict.fromkeys(
        (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
        torch.float32,
    ),
    **dict.fromkeys(
        (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool), torch.int64
    ),
}


def reduction_of(spec: Any, coordinate: Sequence[int]) -> Reduction | str | None:
    """Return how a DTensor is reduced; None if it is not partial, a reason if it cannot be."""
    operators, divisor, ranks = set(), 1, 1
    replica = []
    for dim, placement in enumerate(spec.placements):
        if placement.is_replicate():
            replica.append(coordinate[dim])
        elif placement.is_partial():
            kind = type(placement).__name__
            operator = placement.reduce_op if kind == "Partial" else kind
            size = spec.mesh.size(dim)
            ranks *= size
            if operator == "avg":
                operator, divisor = "sum", divisor * size
            operators.add(operator)
    if not operators:
        return None
    if len(operators) > 1 or not operators <= _OPERATORS.keys():
        return f"partial tensors with {', '.join(sorted(map(str, operators)))} cannot be reduced"
    replica.append(hash_word((tuple(spec.mesh.shape), spec.mesh.mesh.flatten().tolist())))
    return Reduction(operators.pop(), divisor, ranks, tuple(replica))


def reduction_dtype(dtype: torch.dtype, reduction: Reduction) -> torch.dtype | None:
    """Return the dtype in which values of `dtype` are reduced, or None if they cannot be."""
    wide = _REDUCTION_DTYPES.get(dtype)
    if reduction.divisor > 1 and (wide is None or not wide.is_floating_point):
        return None
    return wide


class Slot(NamedTuple):
    """The place of a shard of a partial tensor in the buffer of its operator and dtype.

    Values with this `spec` are reduced. The values of `missing` ranks are missing.
    """

    label: Label
    spec: PartialSpec
    begin: int
    missing: int

    @property
    def bucket(self) -> Bucket:
        return self.spec.reduction.operator, self.spec.dtype


class Plan(NamedTuple):
    """The slots and the size of each buffer; equal on all ranks."""

    slots: tuple[Slot, ...]
    sizes: dict[Bucket, int]


def make_plan(partial_specs: Sequence[PartialSpecs]) -> Plan:
    """Return the plan for the specs of all ranks.

    Raises:
        ValueError: the specs of a tensor contradict each other.
    """
    by_label: dict[Label, list[PartialSpec]] = {}
    for rank_specs in partial_specs:
        for label, spec in rank_specs:
            by_label.setdefault(label, []).append(spec)
    slots: list[Slot] = []
    sizes: dict[Bucket, int] = {}
    for label, specs in sorted(by_label.items()):
        kinds = {(s.reduction.operator, s.reduction.divisor, s.dtype) for s in specs}
        if len(kinds) > 1:
            got = ", ".join(sorted(f"{operator} of {dtype}" for operator, _, dtype in kinds))
            raise _conflict(label, f"one operator and dtype on all ranks, got {got}")
        shards: dict[int, list[PartialSpec]] = {}
        for spec in specs:
            shards.setdefault(spec.shard_index, []).append(spec)
        for _, (first, *others) in sorted(shards.items()):
            replica = [s for s in others if s.reduction.replica == first.reduction.replica]
            numels = {s.numel for s in (first, *replica)}
            if len(numels) > 1:
                raise _conflict(label, f"values of one size on all ranks, got {sorted(numels)}")
            missing = first.reduction.ranks - 1 - len(replica)
            bucket = first.reduction.operator, first.dtype
            slots.append(Slot(label, first, sizes.get(bucket, 0), missing))
            sizes[bucket] = sizes.get(bucket, 0) + first.numel
    return Plan(tuple(slots), sizes)


def _conflict(label: Label, expected: str) -> ValueError:
    name = f"{label[0]} (gradient)" if label[1] else label[0]
    return ValueError(
        f"paramstats.summarize: expected the partial tensor {name!r} to have {expected}"
    )


def reduce_partials(
    plan: Plan,
    specs: dict[Label, PartialSpec],
    values: dict[Label, Tensor],
    ranks: Ranks,
) -> list[Tensor]:
    """Return the reduced elements of each slot.

    Args:
        plan: the plan of all ranks; it alone determines the collective calls.
        specs, values: this rank's partial tensors.
        ranks: the ranks, for the collective calls.
    """
    buffers, device = {}, ranks.device
    for (operator, dtype), size in plan.sizes.items():
        neutral = _neutral(operator, dtype)
        buffers[operator, dtype] = torch.full((size,), neutral, dtype=dtype, device=device)
    parts = [buffers[slot.bucket][slot.begin :][: slot.spec.numel] for slot in plan.slots]
    for slot, part in zip(plan.slots, parts, strict=True):
        if specs.get(slot.label) == slot.spec:
            part.copy_(values[slot.label])
    for (operator, _), buffer in buffers.items():
        ranks.all_reduce(buffer, _OPERATORS[operator])
    for slot, part in zip(plan.slots, parts, strict=True):
        if slot.spec.reduction.divisor > 1:
            part /= slot.spec.reduction.divisor
    return parts


def _neutral(operator: str, dtype: torch.dtype) -> float:
    """Return the value that does not change the result of a reduction."""
    low, high = -torch.inf, torch.inf
    if not dtype.is_floating_point:
        low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    return {"sum": 0, "product": 1, "max": low, "min": high}[operator]
