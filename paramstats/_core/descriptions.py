"""Describe tensors for a `Layout`: shapes, dtypes and devices; and check their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from paramstats._core.shard import PLAIN, is_sharded
from paramstats._core.torch_private import without_modes


def check_distinct(names: tuple[str, ...], aliases: tuple[tuple[str, ...], ...]) -> None:
    """Raise ValueError if two tensors share a name, e.g. because a module's name has a dot."""
    if len(set(names).union(*aliases)) == len(names) + sum(map(len, aliases)):
        return
    row_of: dict[str, int] = {}
    for row, several in enumerate(zip(names, aliases, strict=True)):
        for name in (several[0], *several[1]):
            if row_of.setdefault(name, row) != row:
                raise ValueError(
                    f"paramstats.summarize: expected every name once, got {name!r} for two tensors"
                )


@without_modes()
def describe(source: Any, tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Return shapes, dtypes, devices and requires_grad of tensors, and whether any is sharded."""
    return (
        tuple([_shape(t) for t in tensors]),
        tuple([t.dtype for t in tensors]),
        tuple([t.device for t in tensors]),
        tuple([t.requires_grad for t in tensors]),
        is_sharded(source, tensors),
    )


def _shape(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return the shape, or None for a lazy parameter or a shape that is not made of integers."""
    try:
        if type(tensor) in PLAIN:
            return tuple(tensor.shape)
        if is_lazy(tensor):
            return None
        return tuple(int(size) for size in tensor.shape)
    except Exception:  # whatever a subclass raises that has no such shape
        return None
