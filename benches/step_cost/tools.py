"""The ways to look at a training that are compared."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import paramstats
from benches.contestants import from_scalars, item_loop_no_grad
from benches.exact import PARAMSTATS, TORCH, Statistics, Tolerances

Look = Callable[[], Any]
"""What a tool does between the backward pass and the optimizer's step."""

Attached = Callable[[nn.Module], AbstractContextManager[Look]]
"""Hooks, if it has any, stay on the model as long as the context lasts."""


@dataclass(frozen=True)
class Tool:
    """One way to look at a training."""

    name: str
    title: str
    attached: Attached
    statistics: Callable[[Any], dict[str, Statistics]] | None = None
    """What a look returned, by `models.tensors`' names; None where it returns nothing to check."""
    tolerances: Tolerances = PARAMSTATS


def called(look: Callable[[nn.Module], Any]) -> Attached:
    """A function of the model that has nothing to attach."""

    @contextmanager
    def attached(model: nn.Module) -> Iterator[Look]:
        yield lambda: look(model)

    return attached


@contextmanager
def _hooks(model: nn.Module) -> Iterator[Look]:
    """Each gradient is summarised as soon as it is accumulated, while it may still be in cache."""
    found: list[paramstats.Summary] = []

    def hook_of(name: str) -> Callable[[torch.Tensor], None]:
        def hook(p: torch.Tensor) -> None:
            assert p.grad is not None
            found.append(paramstats.summarize({name: p.grad}))

        return hook

    def collect() -> dict[str, float]:
        log: dict[str, float] = {}
        for summary in found:
            log.update(summary.scalars(_GRADIENT_KEY, totals=False))
        found.clear()
        return log

    with ExitStack() as stack:
        for name, p in model.named_parameters():
            stack.callback(p.register_post_accumulate_grad_hook(hook_of(name)).remove)
        yield collect


_GRADIENT_KEY = "grad_{stat}/{name}"


def _paramstats() -> list[Tool]:
    return [
        Tool(
            "paramstats",
            "paramstats",
            called(lambda model: paramstats.summarize(model).scalars()),
            _without_total,
        ),
        Tool(
            "paramstats_gradients",
            "paramstats, gradients alone",
            called(lambda model: paramstats.summarize(model, params=False).scalars()),
            _without_total,
        ),
        Tool("paramstats_hooks", "paramstats, from each gradient's hook", _hooks, from_scalars),
    ]


def _without_total(scalars: dict[str, float]) -> dict[str, Statistics]:
    return from_scalars({key: x for key, x in scalars.items() if not key.endswith("/total")})


def _lightning(stack: ExitStack) -> Tool:
    grad_norm = importlib.import_module("lightning.pytorch.utilities").grad_norm

    def statistics(norms: dict[str, torch.Tensor]) -> dict[str, Statistics]:
        named = {key.partition("/")[2]: norm.item() for key, norm in norms.items() if "/" in key}
        return {f"{name}.grad": (None, None, norm, None) for name, norm in named.items()}

    return Tool(
        "lightning",
        "Lightning's `grad_norm`",
        called(lambda model: grad_norm(model, norm_type=2)),
        statistics,
        TORCH,
    )


def _wandb(stack: ExitStack) -> Tool:
    """Histograms of all parameters and gradients at every step, in one run for all models."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="paramstats-wandb-"))
    for variable in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        os.environ[f"WANDB_{variable}"] = folder
    os.environ.update(
        WANDB_MODE="offline", WANDB_SILENT="true", WANDB_CONSOLE="off", WANDB__DISABLE_STATS="true"
    )
    wandb = importlib.import_module("wandb")
    run = wandb.init(project="paramstats", mode="offline")
    stack.callback(run.finish)

    @contextmanager
    def attached(model: nn.Module) -> Iterator[Look]:
        run.watch(model, log="all", log_freq=1, idx=0)
        try:
            yield lambda: run.log({"step": 1})
        finally:
            run.unwatch(model)

    return Tool("wandb_watch", '`wandb.watch(log="all")`', attached)


def available(stack: ExitStack) -> tuple[list[Tool], dict[str, str]]:
    """All that can be tried here, "nothing" first; and why the others cannot."""
    found = [
        Tool("nothing", "nothing", called(lambda model: None)),
        *_paramstats(),
        Tool(
            "item_loop", "`.item()` loop", called(item_loop_no_grad), lambda log: log, TORCH
        ),
    ]  # fmt: skip
    missing = {}
    for make in (_lightning, _wandb):
        try:
            found.append(make(stack))
        except ImportError as error:
            missing[make.__name__.strip("_")] = f"{error}"
    return found, missing
