"""Refuses what this process holds only a part of: a shard's figures would pass for the whole's."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch

_WHOLE = (torch.Tensor, torch.nn.Parameter)


def refuse_shards(names: Iterable[str], tensors: Iterable[torch.Tensor]) -> None:
    """Raises NotImplementedError at the first tensor that is a shard (DTensor, ZeRO-3)."""
    for name, tensor in zip(names, tensors, strict=True):
        if type(tensor) not in _WHOLE and hasattr(tensor, "placements"):
            if not all(placement.is_replicate() for placement in tensor.placements):
                raise _refusal(
                    f"a DTensor placed as {tuple(tensor.placements)}",
                    name,
                    "gather it first, as with tensor.full_tensor() on every rank",
                )
        elif hasattr(tensor, "ds_id") and tensor.numel() != getattr(tensor, "ds_numel", 0):
            raise _refusal(
                "a parameter partitioned by DeepSpeed ZeRO-3",
                name,
                "gather it first, as with deepspeed.zero.GatheredParameters",
            )


def refuse_sharded_modules(module: torch.nn.Module) -> None:
    """Raises NotImplementedError for FSDP's first generation, whose shards are plain tensors."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    for name, child in module.named_modules():
        if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(child).__mro__):
            raise _refusal(
                "a FullyShardedDataParallel module",
                name,
                "gather it first, as with FullyShardedDataParallel.summon_full_params",
            )


def _refusal(got: str, name: str, remedy: str) -> NotImplementedError:
    return NotImplementedError(
        f"paramstats.summarize: expected tensors that this process holds whole, got {got} for "
        f"'{name}'; {remedy}"
    )
