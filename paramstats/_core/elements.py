"""Convert any tensor (sparse, quantized, subclass) to a plain strided one."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from paramstats._core.shard import PLAIN
from paramstats._core.torch_private import unwrapped

_FLOATS = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
_INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "bool")
_REAL = frozenset(getattr(torch, name) for name in (*_FLOATS, *_INTEGERS))
"""Dtypes that every operator of `packing` supports."""


def dense_numel(x: Tensor) -> int:
    """Return the number of elements of a plain, real and contiguous tensor, otherwise -1.

    `elements(x)` would return such a tensor as it is, and `check_storage` would not raise.
    """
    try:
        if type(x) not in PLAIN or x.dtype not in _REAL or not x.is_contiguous() or x.is_nested:
            return -1
        n, begin = x.numel(), x.storage_offset()
        # Raises for other layouts, and for a wrapper of torch.func.
        nbytes = x.untyped_storage().nbytes()
        return n if begin >= 0 and (begin + n) * x.itemsize <= nbytes else -1
    except Exception:  # whatever a tensor without a storage raises
        return -1


def elements(x: Tensor) -> tuple[Tensor, int]:
    """Return a strided tensor of the stored elements, and the number of zeros not stored."""
    if x.is_nested:
        raise TypeError("nested tensors are not read; pass their parts")
    if type(x) is not Tensor:
        x = _plain(x)
    x = unwrapped(x)
    if x.is_quantized:
        x = x.dequantize()
    if x.layout is torch.strided:
        return x.resolve_neg().resolve_conj() if x.is_neg() or x.is_conj() else x, 0
    if x.layout is torch.sparse_coo:
        stored = x.coalesce().values()
    elif x.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        stored = x.values()
    else:
        return x.to_dense(), 0
    return stored, x.numel() - stored.numel()


def _plain(x: Tensor) -> Tensor:
    """Convert a tensor of a subclass to a plain one, with the methods that the subclass has."""
    if type(x) is torch.nn.Parameter:
        return x.detach()
    if hasattr(x, "to_local"):  # a DTensor that is complete on this rank
        return x.to_local()  # type: ignore[no-any-return]
    if type(x).__torch_dispatch__ == Tensor.__torch_dispatch__:  # it holds its elements itself
        with torch._C.DisableTorchFunctionSubclass():
            return x.detach().as_subclass(Tensor)
    for convert in (lambda: x.dequantize(), lambda: x.to(torch.float64)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings that the operator is missing
                plain = convert()
        except Exception:  # a subclass may raise anything for an operator that it lacks
            continue
        if type(plain) is Tensor and plain.numel() == x.numel():
            return plain
    raise TypeError(f"{type(x).__qualname__} has no operator that returns its elements")


def check_storage(x: Tensor) -> None:
    """Raise ValueError if the storage is too small, e.g. because it was resized to 0."""
    nbytes = x.untyped_storage().nbytes()
    begin = x.storage_offset()
    if x.is_contiguous() and begin >= 0 and nbytes >= (begin + x.numel()) * x.element_size():
        return
    if x.numel() == 0:
        return
    reach = [(n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)]
    first = begin + sum(r for r in reach if r < 0)
    last = begin + sum(r for r in reach if r > 0)
    if first < 0 or (last + 1) * x.element_size() > nbytes:
        raise ValueError(f"its storage holds {nbytes} bytes, not all elements")


def gradient(tensor: Tensor) -> Tensor | None:
    """Return `tensor.grad`, or None without torch's warning for a tensor that is not a leaf."""
    if tensor.is_leaf or tensor.retains_grad:
        return tensor.grad
    return None


def numel(tensor: Tensor) -> int:
    """Return the number of elements, or 0 where it is not known."""
    try:
        return 0 if is_lazy(tensor) else int(tensor.numel())
    except Exception:  # symbolic sizes, or a subclass without sizes
        return 0
