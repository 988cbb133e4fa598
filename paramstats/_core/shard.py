"""Parts of tensors: how a caller describes one, and which tensors a process has only a part of.

Light: what reads and joins parts is in `paramstats.sharded`, imported when the first one is met.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

_MOST = 1 << 60
_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True, eq=False)
class LocalShard:
    """What this process holds of a tensor that was cut up by hand, as Megatron's layers are.

    >>> import torch, paramstats
    >>> mine = paramstats.LocalShard(torch.ones(3), index=0, numel=3)  # of one process, all of it
    >>> paramstats.summarize({"w": mine})["w"].mean
    1.0

    In a mapping or pairs for `summarize`, it stands for the whole tensor, whose statistics come out,
    the same on every process.

    Args:
        tensor: the elements that are here, in any shape; empty where there are none.
        index: which part of the whole it is, a number from 0: the tensor-parallel rank, for example.
            Parts are joined in this order; processes that give the same index hold copies of one
            part, which counts once.
        numel: elements of the whole tensor; that all of them are there is checked.
        shape: of the whole tensor; None: as if it were flat.
        grad: the gradient of these elements; None: `tensor.grad`.
        requires_grad: None: as `tensor`.

    Raises:
        TypeError: `tensor` is none.
        ValueError: `index`, `numel` or `shape` cannot be.
    """

    tensor: torch.Tensor
    index: int
    numel: int
    shape: tuple[int, ...] | None = None
    grad: torch.Tensor | None = None
    requires_grad: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tensor, torch.Tensor):
            raise TypeError(
                f"paramstats.LocalShard: expected a torch.Tensor, got {type(self.tensor).__name__}"
            )
        for field, least in (("index", 0), ("numel", self.tensor.numel())):
            value = getattr(self, field)
            if not isinstance(value, int) or not least <= value <= _MOST:
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
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device


def is_dtensor(tensor: Any) -> bool:
    return tensor.__class__ not in _PLAIN and hasattr(tensor, "placements")


def is_zero_parameter(tensor: Any) -> bool:
    """Whether DeepSpeed's ZeRO-3 has partitioned it."""
    return hasattr(tensor, "ds_id") and hasattr(tensor, "ds_tensor")


def is_sharded(source: Any, tensors: Iterable[Any]) -> bool:
    """Whether any of it is cut up: the same answer on every process that holds the model."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(source, torch.nn.Module):
        # Another thread may be importing it: what is not there yet has wrapped nothing.
        names = ("FSDPModule", "FullyShardedDataParallel")
        wrapped = tuple(getattr(fsdp, name) for name in names if hasattr(fsdp, name))
        if any(isinstance(module, wrapped) for module in _modules(source)):
            return True
    return any(
        isinstance(tensor, LocalShard)
        or is_dtensor(tensor)
        or is_zero_parameter(tensor)
        or getattr(tensor, "_fsdp_flattened", False)
        for tensor in tensors
    )


def _modules(source: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """All modules, once each. Not by `modules()`, which needs their hash, and a stack as deep as
    they are."""
    seen, left = {id(source)}, [source]
    while left:
        module = left.pop()
        yield module
        new = [child for child in children(module) if id(child) not in seen]
        seen.update(map(id, new))
        left.extend(new)


def children(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Its modules, at one moment: another thread may change it. None of one that keeps them in a
    way of its own."""
    try:
        return [child for child in list(module._modules.values()) if child is not None]
    except Exception:
        return []


def refuse_shards(named: Iterable[tuple[str, Any]]) -> None:
    """Raises NotImplementedError at a part of a tensor in a model that is not sharded itself."""
    for name, tensor in named:
        if is_dtensor(tensor):
            raise NotImplementedError(
                f"paramstats.summarize: expected the gradient of a plain tensor to be plain, got a "
                f"DTensor placed as {tuple(tensor.placements)} for '{name}'; make the parameter a "
                f"DTensor, too"
            )
