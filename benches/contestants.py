"""The benchmarked functions of torch and paramstats, which compute statistics of a model.

Those of other libraries are in benches.libraries. `Contestant.run` is timed.
`Contestant.statistics` converts its result to one format for the correctness check and is not
timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

import paramstats

Tensors = Mapping[str, torch.Tensor]

TOTALS = ("total", "total.grad")
"""The names of the statistics of all parameters together, and of all gradients together."""


class Statistics(NamedTuple):
    """Statistics of one tensor; None where a contestant does not compute one."""

    mean: float | None = None
    std: float | None = None
    norm: float | None = None
    zero_fraction: float | None = None
    min: float | None = None
    max: float | None = None


Found = Mapping[str, tuple[float | None, ...]]
"""Statistics by name: those of `models.tensors` and `TOTALS`. A tuple may be a shorter one."""

PARAMSTATS = 2e-5
TORCH = 0.01
"""Largest relative error that is accepted (see benches.checks). torch rounds bfloat16 results to 8
bits, and its float32 norm of GPT-2's embedding (39 M elements) on a CPU is 0.2 % too small."""

_MOST_COMPILED = 64
"""Tensors up to which torch.compile is tried: it needs minutes for a larger model."""


def all_of_them(name: str) -> bool:
    """Tell that a contestant must return the statistics of any name, the totals included."""
    return True


def is_gradient(name: str) -> bool:
    """Tell whether a name is one of a gradient, or of all gradients together."""
    return name.endswith(".grad")


def each_tensor(name: str) -> bool:
    """Tell whether a name is one of a single parameter or gradient."""
    return name not in TOTALS


@dataclass(frozen=True)
class Contestant:
    """One way to compute the statistics of every parameter and gradient."""

    name: str
    run: Callable[..., Any]
    statistics: Callable[..., Found] = lambda result: result
    """Converts the result of `run`. It gets the result and the arguments after the model."""
    tolerance: float = TORCH
    required: Callable[[str], bool] = each_tensor
    """Tells whether the contestant must return the statistics of a name."""
    arguments: Callable[[nn.Module], tuple[Any, ...]] = lambda model: (model,)
    """The arguments of `run`, made before the timing."""
    backend: str | None = None
    """The backend that paramstats must use."""
    queue: Callable[[nn.Module], Any] | None = None
    """The part of `run` that queues GPU work without waiting; its GPU time is measured."""
    compiles: bool = False
    """Whether the first call compiles, which may take long or fail."""
    why_not: Callable[[Tensors], str | None] = lambda tensors: None
    """Returns the reason why the contestant cannot read these tensors, or None."""

    def call(self, model: nn.Module) -> Callable[[], Any]:
        """Return a call of `run` without arguments, to be timed."""
        return functools.partial(self.run, *self.arguments(model))


# ---- the loop that paramstats replaces ----------------------------------------------------------


@torch.no_grad()
def item_loop(model: nn.Module) -> Found:
    log: dict[str, tuple[float, ...]] = {}
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


def batched_torch(model: nn.Module) -> Found:
    """Synchronize once for all tensors."""
    names, tensors = named_tensors(model)
    return _by_name(names, four_of_each(tensors))


def compiled_torch(model: nn.Module) -> Found:
    """Like `batched_torch`, with the reductions fused by torch.compile into one graph per model."""
    names, tensors = named_tensors(model)
    return _by_name(names, _compiled_four_of_each()(tensors))


def foreach_norm(model: nn.Module) -> Found:
    """Compute only one of the four statistics."""
    names, tensors = named_tensors(model)
    norms = torch.stack(torch._foreach_norm(tensors)).tolist()
    return {name: Statistics(norm=norm) for name, norm in zip(names, norms, strict=True)}


@torch.no_grad()
def get_total_norm(model: nn.Module) -> float:
    """Compute only the norm of all gradients, as torch's gradient clipping does."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(nn.utils.get_total_norm(gradients))


def _by_name(names: list[str], rows: torch.Tensor) -> Found:
    return {name: tuple(row) for name, row in zip(names, rows.tolist(), strict=True)}


def named_tensors(model: nn.Module) -> tuple[list[str], list[torch.Tensor]]:
    """Return the names of `models.tensors` and the tensors."""
    names, tensors = [], []
    for name, p in model.named_parameters():
        for key, t in ((name, p), (f"{name}.grad", p.grad)):
            if t is not None:
                names.append(key)
                tensors.append(t)
    return names, tensors


def _why_not_compiled(tensors: Tensors) -> str | None:
    return "compiling more than 64 tensors takes minutes" if len(tensors) > _MOST_COMPILED else None


# ---- paramstats ---------------------------------------------------------------------------------


def scalars(model: nn.Module) -> dict[str, float]:
    """Return floats of four statistics per tensor, as most contestants do, and of the totals."""
    return paramstats.summarize(model).scalars()


def total_grad_norm(model: nn.Module) -> float:
    """Return what gradient clipping needs."""
    return paramstats.summarize(model).total.grad.norm  # type: ignore[union-attr]


def one_statistic(model: nn.Module, name: str) -> float:
    """Return one statistic of one gradient."""
    return paramstats.summarize(model)[name].grad.norm  # type: ignore[union-attr]


def _and_first_name(model: nn.Module) -> tuple[nn.Module, str]:
    return model, next(model.named_parameters())[0]


def stats_by_name(summary: paramstats.Summary) -> dict[str, paramstats.TensorStats]:
    """Return the statistics of parameters, gradients and the totals, by name."""
    statistics: dict[str, paramstats.TensorStats] = {}
    for name, entry in (*summary.items(), ("total", summary.total)):
        statistics[name] = entry
        if entry.grad is not None:
            statistics[f"{name}.grad"] = entry.grad
    return statistics


def from_summary(summary: paramstats.Summary) -> Found:
    return {
        name: Statistics(s.mean, s.std, s.norm, s.zero_fraction, s.min, s.max)
        for name, s in stats_by_name(summary).items()
    }


def from_scalars(values: dict[str, float]) -> Found:
    """Collect mean, std, norm and zero fraction, which follow each other, for each name."""
    statistics: dict[str, tuple[float, ...]] = {}
    for key, value in values.items():
        kind_and_stat, _, name = key.partition("/")
        suffix = ".grad" if kind_and_stat.startswith("grad_") else ""
        statistics[f"{name}{suffix}"] = (*statistics.get(f"{name}{suffix}", ()), value)
    return statistics


def _from_norm(norm: float, name: str = "total") -> Found:
    return {f"{name}.grad": Statistics(norm=norm)}


def _is_total_grad(name: str) -> bool:
    return name == "total.grad"


def _why_no_grad(tensors: Tensors) -> str | None:
    return None if any(map(is_gradient, tensors)) else "there is no gradient"


SUMMARIZE = Contestant(
    "paramstats", paramstats.summarize, from_summary, PARAMSTATS, all_of_them, backend="native",
    queue=paramstats.summarize,
)  # fmt: skip
SCALARS = Contestant("scalars", scalars, from_scalars, PARAMSTATS, all_of_them, backend="native")
TOTAL_GRAD_NORM = Contestant(
    "total_grad_norm", total_grad_norm, _from_norm, PARAMSTATS, _is_total_grad, backend="native",
    why_not=_why_no_grad,
)  # fmt: skip
ONE_STATISTIC = Contestant(
    "one_statistic", one_statistic, _from_norm, PARAMSTATS, lambda name: False, _and_first_name,
    "native", why_not=_why_no_grad,
)  # fmt: skip
REFERENCE_SCALARS = Contestant(
    "reference_scalars", scalars, from_scalars, PARAMSTATS, all_of_them, backend="reference",
    queue=paramstats.summarize,
)  # fmt: skip
ITEM_LOOP = Contestant("item_loop", item_loop)
BATCHED_TORCH = Contestant(
    "batched_torch", batched_torch, queue=lambda model: four_of_each(named_tensors(model)[1])
)

CONTESTANTS = (
    SUMMARIZE,
    SCALARS,
    TOTAL_GRAD_NORM,
    ONE_STATISTIC,
    REFERENCE_SCALARS,
    ITEM_LOOP,
    BATCHED_TORCH,
    Contestant(
        "foreach_norm_only",
        foreach_norm,
        queue=lambda model: torch._foreach_norm(named_tensors(model)[1]),
    ),
    Contestant(
        "get_total_norm", get_total_norm, _from_norm, required=_is_total_grad, why_not=_why_no_grad
    ),
    Contestant(
        "compiled_torch",
        compiled_torch,
        queue=lambda model: _compiled_four_of_each()(named_tensors(model)[1]),
        compiles=True,
        why_not=_why_not_compiled,
    ),
)
