"""Partial tensors: addends on several processes, added up before anybody reads them.

Who adds up what with whom follows from what all processes have told (`Partials`), never from what
one of them has met: a process whose gradient is None takes part with what changes nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from paramstats.sharded.pieces import Mesh, Reduction

Label = tuple[str, bool]
"""A tensor's first name, and whether it is its gradient that is meant."""


class Partials(NamedTuple):
    """What one process tells of its partial tensors."""

    rows: tuple[tuple[Label, Reduction], ...] = ()
    meshes: tuple[Mesh, ...] = ()

    @property
    def number(self) -> int:
        """Its digest; 0 where there are none."""
        if not self.rows:
            return 0
        return int(struct.unpack("=q", hashlib.sha256(repr(self).encode()).digest()[:8])[0]) | 1


class _Op(NamedTuple):
    reduce: Any
    neutral: Callable[[torch.dtype], float]


def _lowest(dtype: torch.dtype) -> float:
    return -torch.inf if dtype.is_floating_point else torch.iinfo(dtype).min


def _highest(dtype: torch.dtype) -> float:
    return torch.inf if dtype.is_floating_point else torch.iinfo(dtype).max


_OPS = {
    "sum": _Op(dist.ReduceOp.SUM, lambda dtype: 0),
    "avg": _Op(dist.ReduceOp.SUM, lambda dtype: 0),
    "max": _Op(dist.ReduceOp.MAX, _lowest),
    "min": _Op(dist.ReduceOp.MIN, _highest),
    "product": _Op(dist.ReduceOp.PRODUCT, lambda dtype: 1),
}
_NARROW = 4
"""Bytes: types of fewer are added up in float32."""


def trouble_with(reduction: Reduction) -> str | None:
    """Why it cannot be added up here; None where it can."""
    ops = [op for _, op in reduction.dims]
    if any(op not in _OPS for op in ops):
        return f"a partial tensor of {', '.join(map(str, ops))} cannot be added up"
    if reduction.dtype.is_complex or ("avg" in ops and not reduction.dtype.is_floating_point):
        return f"partial tensors of {reduction.dtype} are not added up by {', '.join(ops)}"
    return None


def plan(
    told: Sequence[Partials],
    meshes: Callable[[int, Label], int | None],
    mine: int,
    ranks: Sequence[int],
) -> tuple[list[Label], dict[Label, Reduction]]:
    """All partial rows, in an order that all processes have; and those that this one takes part in.

    Args:
        told: by each process, in order.
        meshes: on which mesh (`Mesh.number`) a process has a tensor; None where it has it not.
        mine: this process's place.
        ranks: the processes' global ranks.

    Raises:
        ValueError: what they told does not go together; on every process alike.
    """
    known = {mesh.number: mesh for partials in told for mesh in partials.meshes}
    by_label: dict[Label, dict[int, Reduction]] = {}
    for place, partials in enumerate(told):
        for label, reduction in partials.rows:
            by_label.setdefault(label, {})[place] = reduction
    own: dict[Label, Reduction] = {}
    for label, reductions in sorted(by_label.items()):
        one = next(iter(reductions.values()))
        mesh = known[one.mesh]
        if any(r._replace(numel=one.numel) != one for r in reductions.values()):
            raise _conflict(label, "partial in one way on all processes, got different ones")
        if not set(mesh.ranks) <= set(ranks):
            raise _conflict(label, "on a mesh within the group, got processes beyond it")
        for block in _blocks(mesh, one.dims):
            places = [ranks.index(rank) for rank in block]
            numels = {reductions[place].numel for place in places if place in reductions}
            if not numels:
                continue
            if len(numels) > 1:
                raise _conflict(label, f"of one size, got addends of {sorted(numels)} elements")
            if any(p not in reductions and meshes(p, label) != one.mesh for p in places):
                raise _conflict(label, "on one mesh on all processes, got others")
            if mine in places:
                own[label] = one._replace(numel=numels.pop())
    return sorted(by_label), own


def _conflict(label: Label, expected: str) -> ValueError:
    name = f"{label[0]} (gradient)" if label[1] else label[0]
    return ValueError(f"paramstats.summarize: expected '{name}' to be {expected}")


def _blocks(mesh: Mesh, dims: Sequence[tuple[int, str]]) -> list[list[int]]:
    """The processes whose addends belong together."""
    reduced = {dim for dim, _ in dims}
    blocks: dict[tuple[int, ...], list[int]] = {}
    coordinates = itertools.product(*(range(size) for size in mesh.shape))
    for rank, coordinate in zip(mesh.ranks, coordinates, strict=True):
        at = tuple(c for dim, c in enumerate(coordinate) if dim not in reduced)
        blocks.setdefault(at, []).append(rank)
    return list(blocks.values())


def addends(
    wanted: dict[Label, Reduction], mine: Callable[[Label], Tensor | None], device: torch.device
) -> tuple[dict[Label, Tensor], Exception | None]:
    """What this process adds, flat, in the type that it is added up in; neutral where it has
    nothing, or cannot have it: the error is for later, when all are told."""
    found: dict[Label, Tensor] = {}
    trouble: Exception | None = None
    for label, reduction in wanted.items():
        narrow = reduction.dtype.is_floating_point and reduction.dtype.itemsize < _NARROW
        dtype = torch.float32 if narrow else reduction.dtype
        try:
            x = mine(label)
            if x is not None:
                flat = x.detach().to(device, dtype, copy=True)
                found[label] = flat.reshape(reduction.numel)
                continue
        except Exception as error:
            trouble = trouble or error
        neutral = _OPS[reduction.dims[0][1]].neutral(dtype)
        found[label] = torch.full((reduction.numel,), neutral, dtype=dtype, device=device)
    return found, trouble


def add_up(
    wanted: dict[Label, Reduction], values: dict[Label, Tensor], mesh: Callable[[Label], Any]
) -> dict[Label, Tensor]:
    """By one all_reduce for each mesh dimension, operator and type."""
    longest = max((len(reduction.dims) for reduction in wanted.values()), default=0)
    for position in range(longest):
        buckets: dict[Any, list[Label]] = {}
        for label, reduction in wanted.items():
            if position < len(reduction.dims):
                dim, op = reduction.dims[position]
                group = mesh(label).get_group(dim)
                buckets.setdefault((group, op, values[label].dtype), []).append(label)
        for (group, op, _), members in buckets.items():
            flat = torch.cat([values[label] for label in members])
            dist.all_reduce(flat, _OPS[op].reduce, group)
            if op == "avg":
                flat /= dist.get_world_size(group)
            sizes = [values[label].numel() for label in members]
            values.update(zip(members, flat.split(sizes), strict=True))
    return values
