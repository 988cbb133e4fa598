"""What this process holds of each tensor: its own elements, and where they belong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from paramstats._core.elements import gradient
from paramstats._core.shard import LocalShard
from paramstats._sharded.merging import NOT_HELD
from paramstats._sharded.partial import Addends, addends_of


class Placing(NamedTuple):
    """Where a DTensor's local elements belong."""

    spec: Any
    """The DTensor's own, kept so that no other has its address."""
    key: int
    addends: Addends | str | None
    """Of a partial tensor; a reason where it cannot be added up."""


Placings = dict[int, Placing]
"""What is known of DTensors' specs, by their addresses."""


class Held:
    """What is here of tensors and, after them, of their gradients."""

    def __init__(self) -> None:
        self.tensors: list[Tensor | None] = []
        """None: nothing, as of a gradient that is None."""
        self.keys: list[int] = []
        self.partial: dict[int, Addends | str] = {}
        """Of partial tensors, by row."""

    def add(self, x: Any, known: Placings) -> None:
        spec = getattr(x, "_spec", None)
        if spec is None:
            is_shard = isinstance(x, LocalShard)
            self._put(x.tensor if is_shard else x, x.index if is_shard else 0)
            return
        placing = known.get(id(spec))
        if placing is None:
            placing = known[id(spec)] = _placing(spec)
        if placing.addends is not None:
            self.partial[len(self.tensors)] = placing.addends
        self._put(x._local_tensor, placing.key)

    def add_gradient(self, grad: Any, row: int, known: Placings) -> None:
        """Of the tensor in `row`."""
        if grad is not None and hasattr(grad, "_spec"):
            self.add(grad, known)
        else:
            self._put(grad, self.keys[row])

    def _put(self, tensor: Tensor | None, key: int) -> None:
        self.tensors.append(tensor)
        self.keys.append(key)


def held(rows: Sequence[Any], grads: bool, known: Placings) -> Held:
    """Of tensors, shards and DTensors, and their gradients."""
    if len(known) > 4 * len(rows) + 64:  # gradients with a spec of their own at every call
        known.clear()
    found = Held()
    for x in rows:
        found.add(x, known)
    for row, x in enumerate(rows):
        found.add_gradient(_gradient(x) if grads else None, row, known)
    return found


def _gradient(x: Any) -> Tensor | None:
    if isinstance(x, LocalShard):
        return gradient(x.tensor) if x.grad is None else x.grad
    return gradient(x)


def _placing(spec: Any) -> Placing:
    """The number of a shard among all shards of its tensor: mesh dimensions that do not cut it do
    not count, so that copies have the same."""
    mesh = spec.mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # a mesh that this process is no part of
        return Placing(spec, NOT_HELD, None)
    key = 0
    for dim, placement in enumerate(spec.placements):
        # A _StridedShard is no Shard, and cuts all the same.
        if not (placement.is_partial() or placement.is_replicate()):
            key = key * mesh.size(dim) + coordinate[dim]
    return Placing(spec, key, addends_of(spec, coordinate))
