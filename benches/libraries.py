"""The benchmarked functions of other libraries, for models and for one tensor.

Every call begins with torch's tensors. No library copies their elements.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math

import torch
from torch import nn

from benches.contestants import (
    BATCHED_TORCH,
    CONTESTANTS,
    SCALARS,
    SUMMARIZE,
    Contestant,
    Found,
    Statistics,
    Tensors,
    named_tensors,
)

_LARGE = 1 << 26
"""Bytes from which slow contestants are not measured."""


def _why_not_installed(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def _is_large(tensors: Tensors) -> bool:
    return sum(tensor.nbytes for tensor in tensors.values()) > _LARGE


# ---- models -------------------------------------------------------------------------------------


def numpy_views(model: nn.Module) -> Found:
    """Use NumPy's reductions."""
    import numpy as np

    statistics: dict[str, Statistics] = {}
    for name, tensor in zip(*named_tensors(model), strict=True):
        x = tensor.detach().numpy().ravel()
        zero_fraction = 1 - np.count_nonzero(x) / x.size
        norm = float(np.linalg.norm(x))
        statistics[name] = Statistics(float(x.mean()), float(x.std(ddof=1)), norm, zero_fraction)
    return statistics


def _why_not_numpy(tensors: Tensors) -> str | None:
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors.values()):
        return "NumPy is measured for float32 on the CPU only"
    return _why_not_installed("numpy")


def lovely(model: nn.Module) -> dict[str, str]:
    """Return the summary line that lovely-tensors prints for each tensor."""
    line = importlib.import_module("lovely_tensors").lovely
    return {name: str(line(t.detach())) for name, t in zip(*named_tensors(model), strict=True)}


def _only_names(lines: dict[str, str]) -> Found:
    """The lines have three digits and a histogram; only the tensors' names are checked."""
    return dict.fromkeys(lines, Statistics())


def _why_not_lovely(tensors: Tensors) -> str | None:
    if len(tensors) > 1000 or _is_large(tensors):
        return "lovely-tensors takes seconds per call for such a large model"
    return _why_not_installed("lovely_tensors")


MODEL_CONTESTANTS = (
    *CONTESTANTS,
    Contestant("numpy", numpy_views, why_not=_why_not_numpy),
    Contestant("lovely_tensors", lovely, _only_names, why_not=_why_not_lovely),
)


# ---- one tensor on the CPU ----------------------------------------------------------------------


def numkong(model: nn.Module) -> Found:
    """Compute sum and sum of squares in one read, minimum and maximum in another."""
    import numkong

    (name,), (tensor,) = named_tensors(model)
    view, n = numkong.from_dlpack(tensor), tensor.numel()
    total, squares = numkong.moments(view)
    least, _, largest, _ = numkong.minmax(view)
    mean = total / n
    std = math.sqrt((squares - total * mean) / (n - 1))
    return {name: Statistics(mean, std, math.sqrt(squares), None, least, largest)}


def _why_not_numkong(tensors: Tensors) -> str | None:
    if torch.get_num_threads() > 1:
        return "NumKong reads a tensor with one thread"
    return _why_not_installed("numkong")


_POLARS_DTYPES = (torch.float32, torch.float64, torch.float16, torch.int8)


def polars(model: nn.Module) -> Found:
    """Compute mean, std, minimum and maximum, on this thread or on all threads of polars.

    polars has as many threads as the machine has processors.
    """
    import polars as pl

    (name,), (tensor,) = named_tensors(model)
    series = pl.Series("x", tensor.detach().numpy())
    if torch.get_num_threads() == 1:
        mean, std, least, largest = series.mean(), series.std(), series.min(), series.max()
    else:
        x = pl.col("x")
        selected = series.to_frame().select(
            mean=x.mean(), std=x.std(), least=x.min(), largest=x.max()
        )
        mean, std, least, largest = selected.row(0)
    return {name: Statistics(mean, std, None, None, least, largest)}


def _why_not_polars(tensors: Tensors) -> str | None:
    if any(tensor.dtype not in _POLARS_DTYPES for tensor in tensors.values()):
        return "polars has no such dtype"
    return _why_not_installed("polars")


def _why_not_torch(tensors: Tensors) -> str | None:
    slow = any(tensor.element_size() < 4 for tensor in tensors.values())
    return "torch takes seconds for so many elements" if slow and _is_large(tensors) else None


TENSOR_CONTESTANTS = (
    SUMMARIZE,
    SCALARS,
    dataclasses.replace(BATCHED_TORCH, why_not=_why_not_torch),
    Contestant("numkong", numkong, why_not=_why_not_numkong),
    Contestant("polars", polars, why_not=_why_not_polars),
)
