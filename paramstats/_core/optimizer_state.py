"""What an optimizer has: its parameters, their state, and hyperparameters."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_WITH_FORMULA = (torch.optim.Adam, torch.optim.AdamW)


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer that a wrapper of accelerate or Lightning calls.

    A wrapper whose own steps have hooks, such as Lookahead, may change the parameters itself.
    """
    while hasattr(getattr(optimizer, "optimizer", None), "param_groups") and not getattr(
        getattr(type(optimizer), "step", None), "hooked", False
    ):
        optimizer = optimizer.optimizer
    return optimizer


def parameters_of(optimizer: Any) -> list[Tensor]:
    """Return the parameters of all groups of an optimizer."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def without_gradient(optimizer: Any) -> frozenset[int]:
    """Return the ids of the parameters of an optimizer that have no gradient; see `Request`."""
    return frozenset(id(param) for param in parameters_of(optimizer) if param.grad is None)


def uses_formula(optimizer: Any, group: Mapping[str, Any], known: Mapping[str, float]) -> bool:
    """Return whether the update of a group's parameters follows from Adam's state.

    `known` has the group's `numbers_of`: a number on a device would have to be waited for.
    A subclass may compute the update differently. The formula divides by 1 - lr * weight decay,
    so a small divisor would make the rounding errors of the parameter large.
    """
    return (
        type(optimizer) in _WITH_FORMULA
        and {"lr", "beta1", "beta2", "eps", "weight_decay"} <= known.keys()
        and known["lr"] * decoupled_decay(optimizer, group, known) <= 0.5
    )


def state_by_parameter(optimizer: Any) -> Mapping[Any, Any]:
    """Return the state of an optimizer by parameter; of ZeroRedundancyOptimizer, this rank's."""
    return getattr(optimizer, "optim", optimizer).state  # type: ignore[no-any-return]


def entries_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors and numbers of a parameter's state by key.

    8-bit states of bitsandbytes are codes: their values replace them.
    """
    out: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.numel()):
            out[str(key)] = value
    for key, codes in list(out.items()):
        number = key.removeprefix("state")
        table, scales = f"qmap{number}", f"absmax{number}"
        if getattr(codes, "dtype", None) == torch.uint8 and {table, scales} <= out.keys():
            out[key] = _decoded(codes, out.pop(table), out.pop(scales))
    return out


def _decoded(codes: Tensor, table: Tensor, scales: Tensor) -> Tensor:
    """Return the values of blockwise 8-bit codes: an entry of `table` times the block's scale."""
    block = -(-codes.numel() // scales.numel())
    block = 1 << (block - 1).bit_length()  # sizes of blocks are powers of two
    values = table.float()[codes.flatten().long()]
    factors = scales.float().repeat_interleave(block)[: codes.numel()]
    return (values * factors).view(codes.shape)


def numbers_of(group: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among the hyperparameters of a group, without waiting for a device."""
    out = {}
    for key, value in group.items():
        several = value if isinstance(value, (tuple, list)) and key != "params" else (value,)
        for i, one in enumerate(several, 1):
            if isinstance(one, Tensor) and one.numel() == 1 and one.is_cpu:
                one = one.item()
            if isinstance(one, numbers.Real) and not isinstance(one, bool):
                stem = key if key == "eps" else key.removesuffix("s")
                name = key if several == (value,) else f"{stem}{i}"
                out[name] = float(one)
    return out


def decoupled_decay(optimizer: Any, group: Mapping[str, Any], known: Mapping[str, float]) -> float:
    """Return the weight decay that is applied to the weight instead of the gradient."""
    is_adamw = isinstance(optimizer, torch.optim.AdamW)
    is_decoupled = group.get("decoupled_weight_decay", is_adamw)
    return known.get("weight_decay", 0.0) if is_decoupled else 0.0
