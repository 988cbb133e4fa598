"""Describe shards of tensors, and tell which tensors and models are sharded.

This module is always imported, so it imports nothing of torch.distributed. `paramstats._sharded`
reads and merges shards; it is imported when the first one is found.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from paramstats._core.torch_private import without_modes

_MAX_NUMBER = 1 << 60
PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True, eq=False)
class LocalShard:
    """The shard of a tensor that this rank holds, for models that are sharded without DTensor.

    >>> import torch, paramstats
    >>> shard = paramstats.LocalShard(torch.ones(3), index=0, numel=3)  # the only shard
    >>> paramstats.summarize({"w": shard})["w"].mean
    1.0

    Pass it to `summarize` in a mapping or in (name, tensor) pairs, on every rank. The statistics
    are those of the whole tensor, equal on all ranks.

    Args:
        tensor: the elements on this rank, in any shape; an empty tensor if there are none.
        index: the number of the shard, from 0; for example the tensor-parallel rank. Ranks that
            give the same index hold replicas of one shard, which counts once.
        numel: number of elements of the whole tensor. `summarize` raises if some are missing.
        shape: shape of the whole tensor; None: (numel,).
        grad: the gradient of these elements; None: `tensor.grad`.
        requires_grad: whether the tensor requires a gradient; None: as `tensor` does.

    Raises:
        TypeError: `tensor` is not a tensor.
        ValueError: `index` or `numel` is not an int in its range, or `shape` does not have `numel`
            elements.
    """

    tensor: torch.Tensor
    index: int
    numel: int
    shape: tuple[int, ...] | None = None
    grad: torch.Tensor | None = None
    requires_grad: bool | None = None

    @without_modes()
    def __post_init__(self) -> None:
        if not isinstance(self.tensor, torch.Tensor):
            raise TypeError(
                f"paramstats.LocalShard: expected a torch.Tensor for tensor, got "
                f"{type(self.tensor).__name__}"
            )
        for field, least in (("index", 0), ("numel", self.tensor.numel())):
            value = getattr(self, field)
            if not isinstance(value, int) or not least <= value <= _MAX_NUMBER:
                raise ValueError(
                    f"paramstats.LocalShard: expected an int of at least {least} for {field}, "
                    f"got {value!r}"
                )
        shape = (self.numel,) if self.shape is None else tuple(self.shape)
        if math.prod(shape) != self.numel:
            raise ValueError(
                f"paramstats.LocalShard: expected a shape of {self.numel} elements, got {shape}"
            )
        object.__setattr__(self, "shape", shape)
        if self.requires_grad is None:
            object.__setattr__(self, "requires_grad", self.tensor.requires_grad)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the elements."""
        with without_modes():
            return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """The device of the elements on this rank."""
        with without_modes():
            return self.tensor.device


def is_dtensor(tensor: Any) -> bool:
    return tensor.__class__ not in PLAIN and hasattr(tensor, "placements")


def is_zero_parameter(tensor: Any) -> bool:
    """Return whether DeepSpeed's ZeRO-3 has partitioned a parameter."""
    return hasattr(tensor, "ds_id") and hasattr(tensor, "ds_tensor")


def is_sharded(source: Any, tensors: Iterable[Any]) -> bool:
    """Return whether any tensor is sharded; the same answer on every rank of a model."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(source, torch.nn.Module):
        # If another thread is just importing the module, it has wrapped nothing yet.
        names = ("FSDPModule", "FullyShardedDataParallel")
        wrappers = tuple(getattr(fsdp, name) for name in names if hasattr(fsdp, name))
        if any(isinstance(module, wrappers) for module in _modules(source)):
            return True
    return any(
        is_zero_parameter(tensor)
        or getattr(tensor, "_fsdp_flattened", False)
        or (
            tensor.__class__ not in PLAIN and (isinstance(tensor, LocalShard) or is_dtensor(tensor))
        )
        for tensor in tensors
    )


def _modules(source: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield every module once. Unlike `source.modules()`, it needs no hash and no recursion."""
    seen, remaining = {id(source)}, [source]
    while remaining:
        module = remaining.pop()
        yield module
        new = [child for child in children(module) if id(child) not in seen]
        seen.update(map(id, new))
        remaining.extend(new)


def children(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the direct children, in a list because another thread may change the module.

    Returns [] for a module that stores its children in an unusual way.
    """
    try:
        return [child for child in list(module._modules.values()) if child is not None]
    except Exception:
        return []


def refuse_shards(rows: Iterable[tuple[int, Any]], row_name: Callable[[int], str]) -> None:
    """Raise NotImplementedError if any row's tensor, of an unsharded model, is a DTensor."""
    for row, tensor in rows:
        if is_dtensor(tensor):
            raise NotImplementedError(
                f"paramstats.summarize: expected the gradient of a plain tensor to be plain, got a "
                f"DTensor placed as {tuple(tensor.placements)} for {row_name(row)!r}; make the "
                f"parameter a DTensor, too"
            )
