"""The tools that benches.step_cost compares: paramstats, `.item()` loop, histograms of others."""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import paramstats
from benches.contestants import (
    ITEM_LOOP,
    PARAMSTATS,
    TORCH,
    Found,
    Statistics,
    all_of_them,
    each_tensor,
    from_scalars,
    is_gradient,
    item_loop,
)
from benches.models import tensors

Run = Callable[[], Any]
"""What a tool does in each step, between the backward pass and the optimizer's step."""

Attached = Callable[[nn.Module, torch.optim.Optimizer], AbstractContextManager[Run]]
"""Attaches a tool to a model and its optimizer; hooks are removed when the context ends."""


@dataclass(frozen=True)
class Tool:
    """One way to observe a training."""

    name: str
    title: str
    attached: Attached
    statistics: Callable[[Any], Found] | None = None
    """Converts the result of a run; None: nothing to check."""
    required: Callable[[str], bool] = all_of_them
    """Tells whether the tool must return the statistics of a name."""
    tolerance: float = PARAMSTATS


def _each_gradient(name: str) -> bool:
    return is_gradient(name) and each_tensor(name)


def called(function: Callable[[nn.Module], Any]) -> Attached:
    """Make a tool of a function that needs no hooks."""

    @contextmanager
    def attached(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Run]:
        yield lambda: function(model)

    return attached


@contextmanager
def _hooks(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Run]:
    """Summarize each gradient right after its accumulation, when it may still be in the cache."""
    summaries: list[paramstats.Summary] = []

    def hook_of(name: str) -> Callable[[torch.Tensor], None]:
        def hook(p: torch.Tensor) -> None:
            assert p.grad is not None
            summaries.append(paramstats.summarize({name: p.grad}))

        return hook

    def collect() -> dict[str, float]:
        log: dict[str, float] = {}
        for summary in summaries:
            log.update(summary.scalars(key="grad_{stat}/{name}", totals=False))
        summaries.clear()
        return log

    with ExitStack() as stack:
        for name, p in model.named_parameters():
            stack.callback(p.register_post_accumulate_grad_hook(hook_of(name)).remove)
        yield collect


@contextmanager
def _read_one_step_later(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Run]:
    """Read the statistics of the previous step, so that the host does not wait for the GPU."""
    last: list[paramstats.Summary] = []

    def run() -> None:
        last.append(paramstats.summarize(model))
        if len(last) > 1:
            last.pop(0).scalars()

    yield run


@contextmanager
def _watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Run]:
    """Read parameters, gradients, the optimizer's state and the updates after each step."""
    with paramstats.watch(model, lambda scalars, step: None, every=1, optimizer=optimizer):
        yield lambda: None


def _lightning(stack: ExitStack) -> Tool:
    grad_norm = importlib.import_module("lightning.pytorch.utilities").grad_norm

    def statistics(norms: dict[str, torch.Tensor]) -> Found:
        named = {key.partition("/")[2]: norm.item() for key, norm in norms.items() if "/" in key}
        return {f"{name}.grad": Statistics(norm=norm) for name, norm in named.items()}

    attached = called(lambda model: grad_norm(model, norm_type=2))
    return Tool("lightning", "Lightning's `grad_norm`", attached, statistics, _each_gradient, TORCH)


_WANDB_SECONDS = 1.0
"""Enough for wandb's own process to store what it received, before the next tool is timed."""


def _wandb(stack: ExitStack) -> Tool:
    """Make histograms of all parameters and gradients in every step."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="paramstats-wandb-"))
    for variable in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        os.environ[f"WANDB_{variable}"] = folder
    os.environ.update(WANDB_SILENT="true", WANDB_CONSOLE="off", WANDB__DISABLE_STATS="true")
    wandb = importlib.import_module("wandb")
    run = wandb.init(project="paramstats", mode="offline")
    stack.callback(run.finish)

    @contextmanager
    def attached(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Run]:
        run.watch(model, log="all", log_freq=1, idx=0)
        try:
            yield lambda: run.log({"step": 1})
        finally:
            run.unwatch(model)
            time.sleep(_WANDB_SECONDS)

    return Tool("wandb_watch", '`wandb.watch(log="all")`', attached)


def _tensorboard(stack: ExitStack) -> Tool:
    """Write histograms of all parameters and gradients in every step."""
    module = importlib.import_module("torch.utils.tensorboard")
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="paramstats-tensorboard-"))
    writer = stack.enter_context(module.SummaryWriter(folder))

    @contextmanager
    def attached(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Run]:
        def run() -> None:
            for name, tensor in tensors(model).items():
                writer.add_histogram(name, tensor)

        yield run
        writer.flush()

    return Tool("tensorboard", "TensorBoard's `add_histogram`", attached)


_HISTC_BINS = 64
"""As many as wandb has."""


def _histc(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: torch.histc(tensor.detach(), _HISTC_BINS) for name, tensor in tensors(model).items()
    }


def available(stack: ExitStack, device: torch.device) -> tuple[list[Tool], dict[str, str]]:
    """Return all tools that are installed, "nothing" first, and why others are missing."""
    summarize = paramstats.summarize
    everything = called(lambda model: summarize(model).scalars())
    gradients = called(lambda model: summarize(model, params=False).scalars())
    found = [
        Tool("nothing", "nothing", called(lambda model: None)),
        Tool("paramstats", "paramstats", everything, from_scalars),
        Tool(
            "paramstats_gradients",
            "paramstats, gradients only",
            gradients,
            from_scalars,
            is_gradient,
        ),
        Tool(
            "paramstats_hooks",
            "paramstats, one call per gradient (hooks)",
            _hooks,
            from_scalars,
            _each_gradient,
        ),
        Tool("paramstats_optimizer", "paramstats, with state and updates", _watch),
        Tool(
            "paramstats_distribution",
            "paramstats, `distribution=True`",
            called(lambda model: summarize(model, distribution=True).scalars()),
            from_scalars,
        ),
        Tool(
            "paramstats_rows",
            "paramstats, `rows=True`",
            called(lambda model: summarize(model, rows=True).scalars()),
            from_scalars,
        ),
        Tool(
            "item_loop",
            "`.item()` loop",
            called(item_loop),
            ITEM_LOOP.statistics,
            each_tensor,
            TORCH,
        ),
        Tool("histc", f"`torch.histc`, {_HISTC_BINS} bins", called(_histc)),
    ]
    if device.type == "cuda":
        title = "paramstats, read one step later"
        found.append(Tool("paramstats_deferred", title, _read_one_step_later))
    missing = {}
    # TensorBoard copies every tensor to the host: minutes for GPT-2, which gpu_check does not have.
    others = (_lightning, _wandb, *(() if device.type == "cuda" else (_tensorboard,)))
    for make in others:
        try:
            found.append(make(stack))
        except ImportError as error:
            missing[make.__name__.strip("_")] = str(error)
    return found, missing
