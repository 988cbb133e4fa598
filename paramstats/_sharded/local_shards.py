"""Find the elements of each tensor that this rank holds, and which shard they are."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from paramstats._core.elements import gradient
from paramstats._core.layout import Layout
from paramstats._core.shard import LocalShard
from paramstats._sharded.merging import NOT_HELD
from paramstats._sharded.partial import Reduction, reduction_of

NO_ROWS = -1
"""The first row of a shard that does not consist of whole rows, or of columns of them."""


class _Placement(NamedTuple):
    """Where a DTensor's local elements belong."""

    spec: weakref.ref[Any]
    """The DTensor's spec. Weak, because a spec keeps a mesh and its process groups alive."""
    shard_index: int
    reduction: Reduction | str | None
    """For a partial tensor; a str is the reason why it cannot be reduced."""
    first_row: int
    """The index in dimension 0 of the whole tensor where the local elements begin, or NO_ROWS."""


_Placements = dict[int, _Placement]  # by the address of the spec
_placements: weakref.WeakKeyDictionary[Layout, _Placements] = weakref.WeakKeyDictionary()


class LocalShards:
    """This rank's shards of all tensors, then those of their gradients, then parts of optimizers.

    Attributes:
        tensors: the local elements; None for a gradient that is None, or a part that is not read.
        indexes: the index of each shard. Replicas of a shard have the same index.
        first_rows: where dimension 0 of each shard begins in that of the whole tensor, or NO_ROWS.
        reductions: how partial tensors are reduced, by row; a str says why one cannot be.
    """

    def __init__(self, layout: Layout, rows: Sequence[Any], grads: bool) -> None:
        """Find the shards of `rows`: plain tensors, `LocalShard`s and DTensors."""
        self.tensors: list[Tensor | None] = []
        self.indexes: list[int] = []
        self.first_rows: list[int] = []
        self.reductions: dict[int, Reduction | str] = {}
        self._known = _placements.setdefault(layout, {})
        if len(self._known) > 4 * len(rows) + 64:  # gradients with a new spec at every call
            self._known.clear()
        for x in rows:
            if hasattr(x, "_spec"):
                self.add_dtensor(x)
            elif isinstance(x, LocalShard):
                self.add(x.tensor, x.index, 0 if x.tensor.shape == x.shape else NO_ROWS)
            else:
                self.add(x, 0)
        for row, x in enumerate(rows):
            grad = _gradient(x) if grads else None
            if hasattr(grad, "_spec"):
                self.add_dtensor(grad)
            else:
                self.add(grad, self.indexes[row], self.first_rows[row])

    def add_dtensor(self, x: Any) -> None:
        """Add this rank's shard of a DTensor."""
        placement = self._known.get(id(x._spec))
        if placement is None or placement.spec() is not x._spec:
            placement = self._known[id(x._spec)] = _placement_of(x._spec)
        if placement.reduction is not None:
            self.reductions[len(self.tensors)] = placement.reduction
        self.add(x._local_tensor, placement.shard_index, placement.first_row)

    def add(self, tensor: Tensor | None, index: int, first_row: int = 0) -> None:
        """Add a shard."""
        self.tensors.append(tensor)
        self.indexes.append(index)
        self.first_rows.append(first_row)


def _gradient(x: Any) -> Tensor | None:
    if isinstance(x, LocalShard):
        return gradient(x.tensor) if x.grad is None else x.grad
    return gradient(x)


def _placement_of(spec: Any) -> _Placement:
    """Number a shard among all shards of its tensor.

    Only mesh dimensions that shard the tensor count, so that replicas get the same number.
    """
    mesh = spec.mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this rank is not in the mesh
        return _Placement(weakref.ref(spec), NOT_HELD, None, NO_ROWS)
    index = 0
    for dim, placement in enumerate(spec.placements):
        # is_shard() would be False for _StridedShard, which shards, too.
        if not (placement.is_partial() or placement.is_replicate()):
            index = index * mesh.size(dim) + coordinate[dim]
    reduction = reduction_of(spec, coordinate)
    return _Placement(weakref.ref(spec), index, reduction, _first_row(spec, coordinate))


def _first_row(spec: Any, coordinate: Sequence[int]) -> int:
    """Return where dimension 0 of the local elements begins in that of the whole tensor.

    NO_ROWS if the local elements are not a range of it: with partial or strided shards.
    """
    first, rows = 0, spec.shape[0] if len(spec.shape) else 1
    for dim, placement in enumerate(spec.placements):
        if placement.is_replicate() or (placement.is_shard() and placement.dim != 0):
            continue
        if not placement.is_shard():
            return NO_ROWS
        size = -(-rows // spec.mesh.size(dim))  # as torch.chunk
        begin = min(rows, size * coordinate[dim])
        first, rows = first + begin, min(size, rows - begin)
    return first
