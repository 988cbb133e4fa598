"""What this process holds of each tensor: its own elements, and where they belong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from paramstats import reference
from paramstats.sharded.merging import NOT_HELD
from paramstats.sharding import Shard


class Reduction(NamedTuple):
    """What turns the addends that processes hold into the elements they stand for."""

    dims: tuple[tuple[int, str], ...]
    """Mesh dimensions, each with its operator ("sum", "avg", ...)."""
    dtype: torch.dtype
    numel: int

    def groups(self, mesh: Any) -> tuple[dist.ProcessGroup, ...]:
        return tuple(mesh.get_group(dim) for dim, _ in self.dims)


class Placing(NamedTuple):
    """Where a DTensor's local elements belong."""

    spec: Any
    """The DTensor's own, kept so that no other has its address."""
    key: int
    partial: tuple[tuple[int, str], ...]


Placings = dict[int, Placing]
"""What is known of DTensors' specs, by their addresses: few for thousands of tensors."""


class Held:
    """What is here of tensors and, after them, of their gradients."""

    def __init__(self) -> None:
        self.tensors: list[Tensor | None] = []
        """None: nothing, as of a gradient that is None."""
        self.keys: list[int] = []
        self.reductions: dict[int, tuple[Reduction, Any]] = {}
        """Of partial tensors, by row, with their meshes."""

    def add(self, x: Any, known: Placings) -> None:
        spec = getattr(x, "_spec", None)
        if spec is None:
            is_shard = isinstance(x, Shard)
            self.tensors.append(x.tensor if is_shard else x)
            self.keys.append(x.key if is_shard else 0)
            return
        placing = known.get(id(spec))
        if placing is None:
            placing = known[id(spec)] = _placing(spec)
        local = x._local_tensor
        if placing.partial and placing.key != NOT_HELD:
            reduction = Reduction(placing.partial, local.dtype, local.numel())
            self.reductions[len(self.tensors)] = (reduction, spec.mesh)
        self.tensors.append(local)
        self.keys.append(placing.key)

    def add_none(self, key: int) -> None:
        self.tensors.append(None)
        self.keys.append(key)


def held(rows: Sequence[Any], grads: bool, known: Placings) -> Held:
    """Of tensors, shards and DTensors, and their gradients."""
    found = Held()
    for x in rows:
        found.add(x, known)
    for x, key in zip(rows, found.keys[: len(rows)], strict=True):
        grad = _gradient(x) if grads else None
        if grad is None:
            found.add_none(key)
        elif hasattr(grad, "_spec"):
            found.add(grad, known)
        else:
            found.tensors.append(grad)
            found.keys.append(key)
    return found


def _gradient(x: Any) -> Tensor | None:
    if isinstance(x, Shard):
        return reference.gradient(x.tensor) if x.grad is None else x.grad
    return reference.gradient(x)


def _placing(spec: Any) -> Placing:
    """The number of a shard among all shards of its tensor: mesh dimensions that do not cut it do
    not count, so that copies have the same."""
    mesh = spec.mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # a mesh that this process is no part of
        return Placing(spec, NOT_HELD, ())
    key, partial = 0, []
    for dim, placement in enumerate(spec.placements):
        if placement.is_partial():
            partial.append((dim, placement.reduce_op))
        elif not placement.is_replicate():  # a _StridedShard is no Shard, and cuts all the same
            key = key * mesh.size(dim) + coordinate[dim]
    return Placing(spec, key, tuple(partial))


# ---- partial tensors ----------------------------------------------------------------------------

_OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}
_NARROW = 4
"""Bytes: types of fewer are added up in float32."""


def reduced(
    wanted: dict[Any, tuple[Reduction, tuple[dist.ProcessGroup, ...]]], addends: dict[Any, Tensor]
) -> dict[Any, Tensor]:
    """The elements that addends stand for, by one all_reduce for each mesh dimension, operator and
    type; a process without addends of its own takes part with zeros."""
    values: dict[Any, Tensor] = {}
    for at, (reduction, groups) in wanted.items():
        dtype = reduction.dtype if reduction.dtype.itemsize >= _NARROW else torch.float32
        if at in addends:
            values[at] = addends[at].detach().reshape(-1).to(dtype, copy=True)
        else:
            device = group_device(groups[0])
            values[at] = torch.zeros(reduction.numel, dtype=dtype, device=device)
    longest = max((len(reduction.dims) for reduction, _ in wanted.values()), default=0)
    for position in range(longest):
        buckets: dict[Any, list[Any]] = {}
        for at, (reduction, groups) in wanted.items():
            if position < len(reduction.dims):
                op = reduction.dims[position][1]
                buckets.setdefault((groups[position], op, values[at].dtype), []).append(at)
        for (group, op, _), members in buckets.items():
            flat = torch.cat([values[at] for at in members])
            dist.all_reduce(flat, _OPS[op], group)
            if op == "avg":
                flat /= dist.get_world_size(group)
            sizes = [values[at].numel() for at in members]
            values.update(zip(members, flat.split(sizes), strict=True))
    return values


def can_reduce(reduction: Reduction) -> bool:
    return all(op in _OPS for _, op in reduction.dims)


def group_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors must lie for a group's collectives: the CPU where it has a backend for it."""
    if group is None or "cpu" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
