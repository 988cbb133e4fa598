"""The things that are timed, each a function of a model, all for the same statistics.

They return the statistics as whoever calls them would take them. What makes them comparable for the
check, `Contestant.statistics`, is not timed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import paramstats
from benches.exact import PARAMSTATS, TORCH, Statistics, Tolerances

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Contestant:
    """One way to get at the statistics of every parameter and gradient."""

    name: str
    run: Callable[[nn.Module], Any]
    statistics: Callable[[Any], dict[str, Statistics]]
    """What `run` returned, by `models.tensors`' names."""
    tolerances: Tolerances
    backend: str | None = None
    """The backend that paramstats must run on."""
    queues: bool = False
    """Whether it returns before a GPU is done, so that the GPU's own time can be told."""
    compiles: bool = False
    """Whether its first call of a model compiles, which may take long or fail."""
    why_not: Callable[[Tensors], str | None] = lambda tensors: None
    """Why it cannot read some tensors, or cannot run here at all."""


# ---- what paramstats replaces -------------------------------------------------------------------


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


# ---- what a careful user would write instead ----------------------------------------------------


@torch.no_grad()
def four_of_each(tensors: list[torch.Tensor]) -> torch.Tensor:
    """A row of statistics for each tensor, on its device, without a wait; zeros are counted without
    the loop's two temporaries."""
    statistics = []
    for tensor in tensors:
        t = tensor.float() if tensor.element_size() == 1 else tensor  # torch has no mean of bytes
        zero_fraction = (t.numel() - t.count_nonzero()) / t.numel()
        statistics += [t.mean(), t.std(), t.norm(), zero_fraction]
    return torch.stack(statistics).view(-1, 4)


def batched_torch(model: nn.Module) -> dict[str, Statistics]:
    """One wait for all."""
    names, tensors = _named_tensors(model)
    return by_name(names, four_of_each(tensors))


@functools.cache
def compiled_four_of_each() -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """Each list of shapes is compiled for itself, all its tensors in one graph."""
    return torch.compile(four_of_each, dynamic=False)


def compiled_torch(model: nn.Module) -> dict[str, Statistics]:
    """The same, each tensor's four reductions fused as torch's compiler can."""
    names, tensors = _named_tensors(model)
    return by_name(names, compiled_four_of_each()(tensors))


def by_name(names: list[str], rows: torch.Tensor) -> dict[str, Statistics]:
    """The one transfer."""
    return {name: tuple(row) for name, row in zip(names, rows.tolist(), strict=True)}


@torch.no_grad()
def foreach_norm_only(model: nn.Module) -> dict[str, float]:
    """One statistic of the four."""
    names, tensors = _named_tensors(model)
    norms = torch.stack(torch._foreach_norm(tensors)).tolist()
    return dict(zip(names, norms, strict=True))


def _named_tensors(model: nn.Module) -> tuple[list[str], list[torch.Tensor]]:
    names, tensors = [], []
    for name, p in model.named_parameters():
        for key, t in ((name, p), (f"{name}.grad", p.grad)):
            if t is not None:
                names.append(key)
                tensors.append(t)
    return names, tensors


def _only_norms(norms: dict[str, float]) -> dict[str, Statistics]:
    return {name: (None, None, norm, None) for name, norm in norms.items()}


# ---- other libraries -----------------------------------------------------------------------------


def numpy_views(model: nn.Module) -> dict[str, Statistics]:
    """NumPy's own reductions of the tensors' memory, without a copy."""
    import numpy as np

    statistics: dict[str, Statistics] = {}
    for name, tensor in zip(*_named_tensors(model), strict=True):
        x = tensor.detach().numpy().ravel()
        statistics[name] = (
            float(x.mean()),
            float(x.std(ddof=1)),
            float(np.linalg.norm(x)),
            1 - np.count_nonzero(x) / x.size,
        )
    return statistics


def _why_not_numpy(tensors: Tensors) -> str | None:
    if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        return "NumPy is tried on float32 alone: it has no bfloat16"
    if any(tensor.device.type != "cpu" for tensor in tensors.values()):
        return "NumPy reads the CPU's memory"
    return _why_not_installed("numpy")


def lovely(model: nn.Module) -> dict[str, str]:
    """lovely-tensors' line for each: minimum, maximum, mean, std and a histogram of a sample."""
    line = importlib.import_module("lovely_tensors").lovely
    return {name: str(line(t.detach())) for name, t in zip(*_named_tensors(model), strict=True)}


_LOVELY = Tolerances(mean=0.1, std=0.1, norm=0.0, zero_fraction=0.0, roundings=0)
"""It prints three digits after the point, which cannot be checked to the last place: only a gross
error would be seen."""

_LOVELY_FIGURES = re.compile(r"\u03bc=(\S+) \u03c3=(\S+)")


def _from_lines(lines: dict[str, str]) -> dict[str, Statistics]:
    statistics: dict[str, Statistics] = {}
    for name, line in lines.items():
        found = _LOVELY_FIGURES.search(line)
        assert found or "all_zeros" in line, line
        mean, std = (_printed(statistic) for statistic in found.groups()) if found else (0.0, 0.0)
        statistics[name] = (mean, std, None, None)
    return statistics


def _printed(statistic: str) -> float | None:
    """None for "0.002" and the like, of which too little is left to be checked."""
    value = float(statistic)
    return None if "e" not in statistic and abs(value) < 0.01 else value


def _why_not_lovely(tensors: Tensors) -> str | None:
    if len(tensors) > 1000 or sum(tensor.nbytes for tensor in tensors.values()) > 1 << 26:
        return "lovely-tensors takes seconds for one call of so large a model"
    return _why_not_installed("lovely_tensors")


def _why_not_installed(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


# ---- paramstats -----------------------------------------------------------------------------


def scalars(model: nn.Module) -> dict[str, float]:
    """To the last float, as the loops: what a logger is handed."""
    return paramstats.summarize(model).scalars(totals=False)


def from_summary(summary: paramstats.Summary) -> dict[str, Statistics]:
    statistics = {}
    for name, entry in summary.items():
        statistics[name] = _four(entry)
        if entry.grad is not None:
            statistics[f"{name}.grad"] = _four(entry.grad)
    return statistics


def _four(stats: paramstats.TensorStats) -> Statistics:
    return stats.mean, stats.std, stats.norm, stats.zero_fraction


def from_scalars(values: dict[str, float]) -> dict[str, Statistics]:
    statistics: dict[str, list[float]] = {}
    for key, value in values.items():  # mean, std, norm and zero_fraction of a tensor in a row
        kind_and_stat, _, name = key.partition("/")
        kind = kind_and_stat.partition("_")[0]
        statistics.setdefault(f"{name}.grad" if kind == "grad" else name, []).append(value)
    return {name: (four[0], four[1], four[2], four[3]) for name, four in statistics.items()}


def _as_it_is(statistics: dict[str, Statistics]) -> dict[str, Statistics]:
    return statistics


CONTESTANTS = (
    Contestant("paramstats", paramstats.summarize, from_summary, PARAMSTATS, "native", queues=True),
    Contestant("paramstats_scalars", scalars, from_scalars, PARAMSTATS, "native"),
    Contestant(
        "paramstats_reference",
        paramstats.summarize,
        from_summary,
        PARAMSTATS,
        "reference",
        queues=True,
    ),
    Contestant("paramstats_reference_scalars", scalars, from_scalars, PARAMSTATS, "reference"),
    Contestant("item_loop", item_loop, _as_it_is, TORCH),
    Contestant("item_loop_no_grad", item_loop_no_grad, _as_it_is, TORCH),
    Contestant("batched_torch", batched_torch, _as_it_is, TORCH),
    Contestant("foreach_norm_only", foreach_norm_only, _only_norms, TORCH),
    Contestant("compiled_torch", compiled_torch, _as_it_is, TORCH, compiles=True),
    Contestant("numpy", numpy_views, _as_it_is, TORCH, why_not=_why_not_numpy),
    Contestant("lovely_tensors", lovely, _from_lines, _LOVELY, why_not=_why_not_lovely),
)
