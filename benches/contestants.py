"""The benchmarked functions: each computes statistics of a model's parameters and gradients.

`Contestant.run` is timed. `Contestant.statistics` converts its result to one format for the
correctness check and is not timed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import paramstats

Tensors = Mapping[str, torch.Tensor]

Statistics = tuple[float | None, float | None, float | None, float | None]
"""mean, std, norm and zero fraction; None where a contestant does not compute one."""

PARAMSTATS = 2e-5
TORCH = 0.01
"""Largest relative error that is accepted (see benches.checks). torch rounds bfloat16 results to 8
bits, and its float32 norm of GPT-2's embedding (39 M elements) on a CPU is 0.2 % too small."""

_MOST_COMPILED = 64
"""Tensors up to which torch.compile is tried: it needs minutes for a larger model."""


@dataclass(frozen=True)
class Contestant:
    """One way to compute the statistics of every parameter and gradient."""

    name: str
    run: Callable[[nn.Module], Any]
    statistics: Callable[[Any], dict[str, Statistics]] = lambda result: result
    """Converts the result of `run`; the keys are those of `models.tensors`."""
    tolerance: float = TORCH
    backend: str | None = None
    """The backend that paramstats must use."""
    queue: Callable[[nn.Module], Any] | None = None
    """The part of `run` that queues GPU work without waiting; its GPU time is measured."""
    compiles: bool = False
    """Whether the first call compiles, which may take long or fail."""
    why_not: Callable[[Tensors], str | None] = lambda tensors: None
    """Returns the reason why the contestant cannot read these tensors, or None."""


# ---- the loop that paramstats replaces ----------------------------------------------------------


def item_loop(model: nn.Module) -> dict[str, Statistics]:
    log: dict[str, Statistics] = {}
    for name, p in model.named_parameters():
        log[name] = (
            p.mean().item(), p.std().item(), p.norm().item(), (p == 0).float().mean().item()
        )  # fmt: skip
        g = p.grad
        if g is not None:
            log[f"{name}.grad"] = (
                g.mean().item(), g.std().item(), g.norm().item(), (g == 0).float().mean().item()
            )  # fmt: skip
    return log


item_loop_no_grad = torch.no_grad()(item_loop)


# ---- optimized torch code -----------------------------------------------------------------------


@torch.no_grad()
def four_of_each(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return one row of four statistics per tensor, on its device, without synchronizing."""
    statistics = []
    for tensor in tensors:
        t = tensor.float() if tensor.element_size() == 1 else tensor  # no mean of 8-bit types
        zero_fraction = (t.numel() - t.count_nonzero()) / t.numel()
        statistics += [t.mean(), t.std(), t.norm(), zero_fraction]
    return torch.stack(statistics).view(-1, 4)


@functools.cache
def _compiled_four_of_each() -> Callable[[list[torch.Tensor]], torch.Tensor]:
    return torch.compile(four_of_each, dynamic=False)


def batched_torch(model: nn.Module) -> dict[str, Statistics]:
    """Synchronize once for all tensors."""
    names, tensors = _named_tensors(model)
    return _by_name(names, four_of_each(tensors))


def compiled_torch(model: nn.Module) -> dict[str, Statistics]:
    """Like `batched_torch`, with the reductions fused by torch.compile into one graph per model."""
    names, tensors = _named_tensors(model)
    return _by_name(names, _compiled_four_of_each()(tensors))


def foreach_norm(model: nn.Module) -> dict[str, Statistics]:
    """Compute only one of the four statistics."""
    names, tensors = _named_tensors(model)
    norms = torch.stack(torch._foreach_norm(tensors)).tolist()
    return {name: (None, None, norm, None) for name, norm in zip(names, norms, strict=True)}


def _by_name(names: list[str], rows: torch.Tensor) -> dict[str, Statistics]:
    return {name: tuple(row) for name, row in zip(names, rows.tolist(), strict=True)}


def _named_tensors(model: nn.Module) -> tuple[list[str], list[torch.Tensor]]:
    names, tensors = [], []
    for name, p in model.named_parameters():
        for key, t in ((name, p), (f"{name}.grad", p.grad)):
            if t is not None:
                names.append(key)
                tensors.append(t)
    return names, tensors


def _why_not_compiled(tensors: Tensors) -> str | None:
    return "compiling more than 64 tensors takes minutes" if len(tensors) > _MOST_COMPILED else None


# ---- other libraries ----------------------------------------------------------------------------


def numpy_views(model: nn.Module) -> dict[str, Statistics]:
    """Use NumPy's reductions on the tensors' memory, without a copy."""
    import numpy as np

    statistics: dict[str, Statistics] = {}
    for name, tensor in zip(*_named_tensors(model), strict=True):
        x = tensor.detach().numpy().ravel()
        zero_fraction = 1 - np.count_nonzero(x) / x.size
        norm = float(np.linalg.norm(x))
        statistics[name] = (float(x.mean()), float(x.std(ddof=1)), norm, zero_fraction)
    return statistics


def _why_not_numpy(tensors: Tensors) -> str | None:
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors.values()):
        return "NumPy is measured for float32 on the CPU only"
    return _why_not_installed("numpy")


def lovely(model: nn.Module) -> dict[str, str]:
    """Return the summary line that lovely-tensors prints for each tensor."""
    line = importlib.import_module("lovely_tensors").lovely
    return {name: str(line(t.detach())) for name, t in zip(*_named_tensors(model), strict=True)}


def _only_names(lines: dict[str, str]) -> dict[str, Statistics]:
    """The lines have three digits and a histogram; only the tensors' names are checked."""
    return dict.fromkeys(lines, (None, None, None, None))


def _why_not_lovely(tensors: Tensors) -> str | None:
    if len(tensors) > 1000 or sum(tensor.nbytes for tensor in tensors.values()) > 1 << 26:
        return "lovely-tensors takes seconds per call for such a large model"
    return _why_not_installed("lovely_tensors")


def _why_not_installed(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


# ---- paramstats ---------------------------------------------------------------------------------


def scalars(model: nn.Module) -> dict[str, float]:
    """Return floats, as the other contestants do."""
    return paramstats.summarize(model).scalars(totals=False)


def stats_by_name(summary: paramstats.Summary) -> dict[str, paramstats.TensorStats]:
    """Return the statistics of parameters and gradients, by the names of `models.tensors`."""
    statistics: dict[str, paramstats.TensorStats] = {}
    for name, entry in summary.items():
        statistics[name] = entry
        if entry.grad is not None:
            statistics[f"{name}.grad"] = entry.grad
    return statistics


def from_summary(summary: paramstats.Summary) -> dict[str, Statistics]:
    return {
        name: (stats.mean, stats.std, stats.norm, stats.zero_fraction)
        for name, stats in stats_by_name(summary).items()
    }


def from_scalars(values: dict[str, float]) -> dict[str, Statistics]:
    """Collect mean, std, norm and zero fraction, which follow each other, for each tensor."""
    statistics: dict[str, list[float]] = {}
    for key, value in values.items():
        kind_and_stat, _, name = key.partition("/")
        suffix = ".grad" if kind_and_stat.startswith("grad_") else ""
        if name != "total":
            statistics.setdefault(f"{name}{suffix}", []).append(value)
    return {name: (four[0], four[1], four[2], four[3]) for name, four in statistics.items()}


def _paramstats(suffix: str, backend: str) -> tuple[Contestant, Contestant]:
    summarize = paramstats.summarize
    return (
        Contestant(
            f"paramstats{suffix}", summarize, from_summary, PARAMSTATS, backend, queue=summarize
        ),
        Contestant(f"paramstats{suffix}_scalars", scalars, from_scalars, PARAMSTATS, backend),
    )


CONTESTANTS = (
    *_paramstats("", "native"),
    *_paramstats("_reference", "reference"),
    Contestant("item_loop", item_loop),
    Contestant("item_loop_no_grad", item_loop_no_grad),
    Contestant(
        "batched_torch",
        batched_torch,
        queue=lambda model: four_of_each(_named_tensors(model)[1]),
    ),
    Contestant(
        "foreach_norm_only",
        foreach_norm,
        queue=lambda model: torch._foreach_norm(_named_tensors(model)[1]),
    ),
    Contestant(
        "compiled_torch",
        compiled_torch,
        queue=lambda model: _compiled_four_of_each()(_named_tensors(model)[1]),
        compiles=True,
        why_not=_why_not_compiled,
    ),
    Contestant("numpy", numpy_views, why_not=_why_not_numpy),
    Contestant("lovely_tensors", lovely, _only_names, why_not=_why_not_lovely),
)
