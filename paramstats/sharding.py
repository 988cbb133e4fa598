"""Parts of tensors: how a caller describes one, and which tensors a process has only a part of.

Light: what reads and joins parts is in `paramstats.sharded`, imported when the first one is met.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True, eq=False)
class Shard:
    """What this process holds of a tensor that was cut up by hand, as Megatron's layers are.

    >>> import torch, paramstats
    >>> mine = paramstats.Shard(torch.ones(3), key=0, numel=3)  # of one process, all of it
    >>> paramstats.summarize({"w": mine})["w"].mean
    1.0

    In a mapping or pairs for `summarize`, it stands for the whole tensor, whose figures come out,
    the same on every process.
    """

    tensor: torch.Tensor
    """The elements that are here, in any shape; empty where there are none."""
    key: int
    """Which part it is, from 0: parts are joined in this order, and processes that give the same
    key hold copies of one part, which counts once."""
    numel: int
    """Elements of the whole tensor; that all are there is checked."""
    shape: tuple[int, ...] | None = None
    """Of the whole tensor; None: as if it were flat."""
    grad: torch.Tensor | None = None
    """The gradient of these elements; None: `tensor.grad`."""
    requires_grad: bool | None = None
    """None: as `tensor`."""

    def __post_init__(self) -> None:
        if not isinstance(self.tensor, torch.Tensor):
            raise TypeError(
                f"paramstats.Shard: expected a torch.Tensor, got {type(self.tensor).__name__}"
            )
        for field, least in (("key", 0), ("numel", self.tensor.numel())):
            value = getattr(self, field)
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"paramstats.Shard: expected an int of at least {least} for {field}, "
                    f"got {value!r}"
                )
        if self.shape is None:
            object.__setattr__(self, "shape", (self.numel,))
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
        wrapped = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
        with contextlib.suppress(TypeError):  # a module without a hash, which FSDP could not wrap
            if any(isinstance(module, wrapped) for module in source.modules()):
                return True
    return any(
        isinstance(tensor, Shard)
        or is_dtensor(tensor)
        or is_zero_parameter(tensor)
        or getattr(tensor, "_fsdp_flattened", False)
        for tensor in tensors
    )


def refuse_shards(named: Iterable[tuple[str, Any]]) -> None:
    """Raises NotImplementedError at a part of a tensor in a model that is not sharded itself."""
    for name, tensor in named:
        if is_dtensor(tensor):
            raise NotImplementedError(
                f"paramstats.summarize: expected the gradient of a plain tensor to be plain, got a "
                f"DTensor placed as {tuple(tensor.placements)} for '{name}'; make the parameter a "
                f"DTensor, too"
            )
