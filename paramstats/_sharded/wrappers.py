"""Models whose parameters are cut up behind their modules' backs: FSDP, FSDP2 and ZeRO-3.

Their libraries have no public way to what is asked for here, a process's own elements and where
they belong; what is used of their inside stands in this file alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn

from paramstats._core.layout import Layout
from paramstats._core.shard import LocalShard, is_zero_parameter

_FSDP = "_fsdp_wrapped_module."


def unwrapped(source: Any, layout: Layout, rows: list[Any]) -> tuple[Layout, list[Any]]:
    """Rows as parts of whole tensors under the names of the model as it was before it was wrapped;
    both as they were where there is nothing to do."""
    replaced: dict[int, list[_Row]] = {}
    if isinstance(source, nn.Module) and "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        for name, module in source.named_modules():
            if isinstance(module, FSDPModule):
                replaced.update(_fsdp2(module))
            elif isinstance(module, FullyShardedDataParallel):
                replaced.update(_fsdp1(name, module))
    for row in rows:
        if is_zero_parameter(row):
            replaced[id(row)] = [_Row(None, _zero3(row), ())]
    for name, row in zip(layout.names, rows, strict=True):
        if getattr(row, "_fsdp_flattened", False) and id(row) not in replaced:
            raise NotImplementedError(
                f"paramstats.summarize: expected the model as FullyShardedDataParallel wrapped it, "
                f"got a parameter that it has flattened for '{name}'; pass the wrapped model"
            )
    if any(id(row) in replaced for row in rows) or any(_FSDP in name for name in layout.names):
        return _replace(layout, rows, replaced)
    return layout, rows


class _Row(NamedTuple):
    name: str | None
    """None: as it was."""
    tensor: Any
    aliases: tuple[str, ...]


def _replace(
    layout: Layout, rows: list[Any], replaced: dict[int, list[_Row]]
) -> tuple[Layout, list[Any]]:
    names, aliases, tensors = [], [], []
    parameters = 0
    for position, row in enumerate(rows):
        name, others = layout.names[position], layout.aliases[position]
        for new in replaced.get(id(row), [_Row(None, row, ())]):
            every = [(new.name or name), *new.aliases, *others]
            first, *rest = dict.fromkeys(n.replace(_FSDP, "") for n in every)
            names.append(first)
            aliases.append(tuple(rest))
            tensors.append(new.tensor)
            parameters += position < layout.parameters
    return Layout.of(None, tuple(names), tuple(aliases), parameters, tensors), tensors


# ---- fully_shard --------------------------------------------------------------------------------


def _fsdp2(module: Any) -> Iterator[tuple[int, list[_Row]]]:
    """Between forward and backward, and after a forward alone, a module's parameters are gathered
    copies, perhaps in another type: in their place the DTensors that the optimizer has."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before torch 2.13
        groups = [state._fsdp_param_group] if state._fsdp_param_group else []
    for group in groups:
        for parameter in group.fsdp_params:
            for attribute in ("_unsharded_param", "_sharded_post_forward_param"):
                stand_in = getattr(parameter, attribute, None)
                if stand_in is not None:
                    yield id(stand_in), [_Row(None, parameter.sharded_param, ())]


# ---- FullyShardedDataParallel -------------------------------------------------------------------


def _fsdp1(name: str, module: Any) -> Iterator[tuple[int, list[_Row]]]:
    """Original parameters are slices of flat ones, of which each process has an equal piece."""
    handle = module._handle
    if handle is None:
        return
    flat = handle.flat_param
    if not handle.uses_sharded_strategy:
        if flat._params is None:
            raise NotImplementedError(
                f"paramstats.summarize: expected FullyShardedDataParallel without sharding to keep "
                f"its parameters, got a flat one for '{name}'; pass use_orig_params=True"
            )
        yield from ((id(p), [_Row(None, p, ())]) for p in flat._params)
        return
    prefix = f"{name}." if name else ""
    rows = [
        _Row(prefix + fqn, _slice_of(flat, i), _shared_names(prefix, flat, fqn))
        for i, fqn in enumerate(flat._fqns)
    ]
    if flat._params is None:
        yield id(flat), rows
    else:
        yield from ((id(p), [row]) for p, row in zip(flat._params, rows, strict=True))


def _slice_of(flat: Any, i: int) -> LocalShard:
    numel, shape = flat._shapes[i].numel(), tuple(flat._shapes[i])
    shard = getattr(flat, "_local_shard", flat.data)  # before the first forward: all there is
    own = None if flat._params is None else flat._params[i]
    requires_grad = (flat if own is None else own).requires_grad
    mine = flat._shard_param_infos[i]
    if not mine.in_shard:  # a part after the last, of no elements
        return LocalShard(shard[:0], numel, numel, shape, None, requires_grad)
    part = slice(mine.offset_in_shard, mine.offset_in_shard + mine.numel_in_shard)
    flat_grad = getattr(flat, "_saved_grad_shard", None) if flat.grad is None else flat.grad
    scattered = flat_grad is None or flat_grad.numel() == shard.numel()  # not so under no_sync
    grad = None
    if scattered and own is not None:
        grad = own.grad
    elif scattered and flat_grad is not None:
        grad = flat_grad[part]
    if grad is not None and grad.numel() != mine.numel_in_shard:
        grad = None
    return LocalShard(shard[part], mine.intra_param_start_idx, numel, shape, grad, requires_grad)


def _shared_names(prefix: str, flat: Any, fqn: str) -> tuple[str, ...]:
    return tuple(
        prefix + _join(info.module_name, info.param_name)
        for info in flat._shared_param_infos
        if _join(info.prim_module_name, info.prim_param_name) == fqn
    )


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


# ---- ZeRO-3 -------------------------------------------------------------------------------------


def _zero3(p: Any) -> LocalShard:
    """Each process has an equal run of the flattened parameter, the last ones padded."""
    part = p.ds_tensor
    size = part.numel()
    key = dist.get_rank(p.ds_process_group)
    here = max(0, min(size, p.ds_numel - key * size))
    grad = p.grad
    if grad is None and hasattr(p, "_z3_optimizer"):
        from deepspeed.utils import safe_get_local_grad

        grad = safe_get_local_grad(p)
    if grad is not None:
        grad = grad.detach().reshape(-1)
        if grad.numel() == p.ds_numel:  # not yet partitioned
            grad = grad[key * size :]
        grad = grad[:here]
    elements = part.detach().view(-1)[:here]
    return LocalShard(elements, key, p.ds_numel, tuple(p.ds_shape), grad, p.requires_grad)
