"""Refuses what this process holds only a part of: a shard's figures would pass for the whole's."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def refuse_shards(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raises NotImplementedError at the first tensor that is a shard (DTensor, FSDP, ZeRO-3)."""
    fsdp = "torch.distributed.fsdp" in sys.modules
    for name, tensor in named:
        if tensor.__class__ not in _PLAIN and hasattr(tensor, "placements"):
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
        elif fsdp and getattr(tensor, "_fsdp_flattened", False):
            raise _refusal(
                "a parameter flattened by FullyShardedDataParallel",
                name,
                "pass its full state_dict(), with StateDictType.FULL_STATE_DICT",
            )


def _refusal(got: str, name: str, remedy: str) -> NotImplementedError:
    return NotImplementedError(
        f"paramstats.summarize: expected tensors that this process holds whole, got {got} for "
        f"'{name}'; {remedy}"
    )
