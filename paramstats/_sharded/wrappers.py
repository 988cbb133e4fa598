"""Find the shards of models wrapped by FSDP, FSDP2 (fully_shard) and DeepSpeed's ZeRO-3.

These libraries have no public way to ask which elements of a parameter are on this rank. All uses
of their private attributes are in this file.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn

from paramstats._core.layout import Layout
from paramstats._core.shard import LocalShard, is_zero_parameter


class _Shard(NamedTuple):
    """What a tensor in the model is read as. Without a name, it keeps the tensor's names."""

    tensor: Any
    name: str | None = None
    aliases: tuple[str, ...] = ()


_Replacements = dict[int, list[_Shard]]  # by the address of the tensor in the model


def tensors_of_optimizers(source: Any, tensors: list[Any]) -> list[Any]:
    """Return the tensors with those that optimizers have in place of gathered parameters."""
    gathered: _Replacements = {}
    if isinstance(source, nn.Module) and "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FSDPModule

        for module in source.modules():
            if isinstance(module, FSDPModule):
                gathered.update(_fsdp2_shards(module))
    return [gathered[id(x)][0].tensor if id(x) in gathered else x for x in tensors]


def find_shards(
    source: Any, layout: Layout, tensors: list[Any], only: Container[int] | None = None
) -> tuple[Layout, list[Any]]:
    """Return the layout and tensors with shards in place of what wrappers put into a model.

    Each tensor is then a plain tensor, a DTensor or a `LocalShard`. Raises NotImplementedError if
    FSDP flattened a parameter and `source` does not tell its place in the whole.

    Args:
        source: the model, mapping or pairs.
        layout, tensors: the tensors of `source`.
        only: the ids of the tensors to return, as optimizers have them; None: all.
    """
    if only is not None:
        known = tensors_of_optimizers(source, tensors)
        rows = [row for row, x in enumerate(known) if id(x) in only]
        layout, tensors = layout.take(rows), [tensors[row] for row in rows]
    replaced: _Replacements = {}
    if isinstance(source, nn.Module) and "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        for name, module in source.named_modules():
            if isinstance(module, FSDPModule):
                replaced.update(_fsdp2_shards(module))
            elif isinstance(module, FullyShardedDataParallel):
                replaced.update(_fsdp1_shards(name, module))
    for x in tensors:
        if is_zero_parameter(x):
            replaced[id(x)] = [_Shard(_zero3_shard(x))]
    for name, x in zip(layout.names, tensors, strict=True):
        if getattr(x, "_fsdp_flattened", False) and id(x) not in replaced:
            raise NotImplementedError(
                f"paramstats.summarize: expected the model as FullyShardedDataParallel returned "
                f"it, got a flattened parameter for {name!r}; pass the wrapped model"
            )
    if any(id(x) in replaced for x in tensors):
        return _replace(layout, tensors, replaced)
    return layout, tensors


def _replace(
    layout: Layout, tensors: list[Any], replaced: _Replacements
) -> tuple[Layout, list[Any]]:
    names, aliases, wrapper_names, shards = [], [], [], []
    parameters = 0
    for row, x in enumerate(tensors):
        for shard in replaced.get(id(x), [_Shard(x)]):
            names.append(shard.name or layout.names[row])
            aliases.append((*shard.aliases, *layout.aliases[row]))
            has_own_name = shard.name is None and layout.wrapper_names
            wrapper_names.append(layout.wrapper_names[row] if has_own_name else ())
            shards.append(shard.tensor)
            parameters += row < layout.parameters
    found = Layout.of(None, tuple(names), tuple(aliases), parameters, shards)
    *fields, _, is_sharded = found.fields
    all_wrapper_names = tuple(wrapper_names) if any(wrapper_names) else ()
    return Layout.shared(*fields, all_wrapper_names, is_sharded), shards


def _fsdp2_shards(module: Any) -> Iterator[tuple[int, list[_Shard]]]:
    """Map gathered parameters to the DTensors that the optimizer has.

    Between forward and backward, and after a forward alone, a module has gathered parameters in
    place of the DTensors, possibly in another dtype.
    """
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before torch 2.13
        groups = [state._fsdp_param_group] if state._fsdp_param_group else []
    for group in groups:
        for parameter in group.fsdp_params:
            for attribute in ("_unsharded_param", "_sharded_post_forward_param"):
                gathered = getattr(parameter, attribute, None)
                if gathered is not None:
                    yield id(gathered), [_Shard(parameter.sharded_param)]


def _fsdp1_shards(name: str, module: Any) -> Iterator[tuple[int, list[_Shard]]]:
    """Map the parameters of an FSDP module to the slices of its flat parameter on this rank."""
    handle = module._handle
    if handle is None:
        return
    flat = handle.flat_param
    if not handle.uses_sharded_strategy:
        if flat._params is None:
            raise NotImplementedError(
                f"paramstats.summarize: expected FullyShardedDataParallel without sharding to keep "
                f"the original parameters, got a flat parameter for {name!r}; pass "
                f"use_orig_params=True"
            )
        yield from ((id(p), [_Shard(p)]) for p in flat._params)
    elif flat._params is not None:
        for i, p in enumerate(flat._params):
            yield id(p), [_Shard(_slice_of(flat, i))]
    else:
        prefix = f"{name}." if name else ""
        yield (
            id(flat),
            [
                _Shard(_slice_of(flat, i), prefix + fqn, _shared_names(prefix, flat, fqn))
                for i, fqn in enumerate(flat._fqns)
            ],
        )


def _slice_of(flat: Any, i: int) -> LocalShard:
    """Return the elements of original parameter `i` that are in this rank's part of a flat one."""
    numel, shape = flat._shapes[i].numel(), tuple(flat._shapes[i])
    local = getattr(flat, "_local_shard", flat.data)  # missing before the first forward
    original = None if flat._params is None else flat._params[i]
    requires_grad = (flat if original is None else original).requires_grad
    info = flat._shard_param_infos[i]
    if not info.in_shard:  # an empty shard, after all others
        return LocalShard(local[:0], numel, numel, shape, None, requires_grad)
    part = slice(info.offset_in_shard, info.offset_in_shard + info.numel_in_shard)
    flat_grad = getattr(flat, "_saved_grad_shard", None) if flat.grad is None else flat.grad
    is_reduced = flat_grad is None or flat_grad.numel() == local.numel()  # not under no_sync
    grad = None
    if is_reduced and original is not None:
        grad = original.grad
    elif is_reduced and flat_grad is not None:
        grad = flat_grad[part]
    if grad is not None and grad.numel() != info.numel_in_shard:
        grad = None
    return LocalShard(local[part], info.intra_param_start_idx, numel, shape, grad, requires_grad)


def _shared_names(prefix: str, flat: Any, fqn: str) -> tuple[str, ...]:
    """Return the other names of an original parameter that is tied."""

    def join(*path: str) -> str:
        return ".".join(filter(None, path))

    return tuple(
        prefix + join(info.module_name, info.param_name)
        for info in flat._shared_param_infos
        if join(info.prim_module_name, info.prim_param_name) == fqn
    )


def _zero3_shard(p: Any) -> LocalShard:
    """Return this rank's elements; all ranks have equally many, the last ones with padding."""
    partition = p.ds_tensor
    size = partition.numel()
    rank = dist.get_rank(p.ds_process_group)
    count = max(0, min(size, p.ds_numel - rank * size))
    grad = p.grad
    if grad is None and hasattr(p, "_z3_optimizer"):
        from deepspeed.utils import safe_get_local_grad

        grad = safe_get_local_grad(p)
    if grad is not None:
        grad = grad.detach().reshape(-1)
        if grad.numel() == p.ds_numel:  # not yet partitioned
            grad = grad[rank * size :]
        grad = grad[:count]
    elements = partition.detach().view(-1)[:count]
    return LocalShard(elements, rank, p.ds_numel, tuple(p.ds_shape), grad, p.requires_grad)
