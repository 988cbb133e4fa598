"""A training of the clinic: its model, its optimizers, and the loop that `fit` makes of them."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

Observe = Callable[..., None]
"""Called as `observe(loss, grad_scale)` after backward, before the step of the optimizer."""


@dataclass
class Training:
    """What the runner needs of a training."""

    model: nn.Module
    optimizer: Any
    """One optimizer, or a list of several."""
    loop: Callable[[Observe], None]


@dataclass(frozen=True)
class Case:
    """A training and what the health check should say of it."""

    name: str
    make: Callable[[], Training]
    codes: tuple[str, ...] = ()
    """Names of the finding codes of which one names the disease; none: healthy."""
    place: str = ""
    """A regular expression of tensors or blocks, one of which must be named; "": any."""
    onset: int = 0
    """The step at which the disease begins."""
    half: str = "set"
    """"set": thresholds may be chosen on it. "judged": they may not."""
    level: str = "WARNING"
    """The least severity of a finding that names the disease."""


def halves(cases: Iterable[Case]) -> list[Case]:
    """Assign the cases to the two halves in turns; tables list variants of a kind in pairs."""
    table = [replace(case, half=("set", "judged")[i % 2]) for i, case in enumerate(cases)]
    assert len({case.name for case in table}) == len(table), "two cases have the same name"
    return table


def optimizer(kind: str, lr: float, **options: Any) -> Callable[..., torch.optim.Optimizer]:
    """Return a function that makes an optimizer of `torch.optim` for parameters."""
    return functools.partial(getattr(torch.optim, kind), lr=lr, **options)


adamw = functools.partial(optimizer, "AdamW")
adam = functools.partial(optimizer, "Adam")
rmsprop = functools.partial(optimizer, "RMSprop")


def sgd(lr: float, momentum: float = 0.9, **options: Any) -> Callable[..., torch.optim.Optimizer]:
    return optimizer("SGD", lr, momentum=momentum, **options)


def muon(lr: float = 0.02, others: float = 3e-3) -> Callable[..., list[torch.optim.Optimizer]]:
    """Muon for the matrices, AdamW for the rest (`fit` passes named parameters)."""

    def make(named: Iterable[tuple[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
        hidden, rest = [], []
        for name, p in named:
            embedding = any(part in name for part in ("embed", "wte", "wpe", "head"))
            (hidden if p.ndim == 2 and not embedding else rest).append(p)
        return [torch.optim.Muon(hidden, lr=lr), torch.optim.AdamW(rest, lr=others)]

    make.named = True  # type: ignore[attr-defined]
    return make


def warmup_cosine(steps: int = 60, warm: int = 10) -> Callable[[Any], Any]:
    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / (steps - warm))))

    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def schedule(kind: str, **options: Any) -> Callable[[Any], Any]:
    return lambda optimizer: getattr(torch.optim.lr_scheduler, kind)(optimizer, **options)


def nothing(*args: Any) -> None:
    """Do nothing, where a training needs no such action."""


def fit(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    make_optimizer: Callable[..., Any],
    steps: int,
    *,
    clip: float | None = None,
    accumulate: int = 1,
    schedule: Callable[[Any], Any] | None = None,
    autocast: torch.dtype | None = None,
    scale: float | None = None,
    zero_grad: bool = True,
    change: Callable[[nn.Module], Any] = nothing,
    before: Callable[[nn.Module, int], Any] = nothing,
    after: Callable[[nn.Module, int], Any] = nothing,
    alter: Callable[[Tensor, int], Tensor] = lambda loss, step: loss,
    trained: str = "",
    observe_late: bool = False,
) -> Training:
    """Return the usual training.

    Args:
        loss_of: returns the loss of a new batch at a step.
        clip: largest norm of all gradients.
        accumulate: batches per step of the optimizer.
        scale: the first scale of a gradient scaler.
        zero_grad: False: the gradients of all steps add up.
        change: called with the model before its optimizer is made.
        before, after: called with the model and the step before forward and after the step.
        alter: returns the loss that backward starts from.
        trained: the optimizer has only parameters whose name this expression does not exclude.
        observe_late: observe after the step, when the gradients are reset.
    """
    change(model)
    names = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if trained:
        names = [(n, p) for n, p in names if not n.startswith(trained)]
    named = getattr(make_optimizer, "named", False)
    made = make_optimizer(names if named else [p for _, p in names])
    optimizers = made if isinstance(made, list) else [made]
    schedulers = [schedule(o) for o in optimizers] if schedule else []
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None

    def zero() -> None:
        for o in optimizers:
            o.zero_grad()

    def step_once(step: int) -> float:
        total = 0.0
        for micro in range(accumulate):
            before(model, step)
            context = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
            with context:
                loss = alter(loss_of(step * accumulate + micro), step) / accumulate
            (scaler.scale(loss) if scaler else loss).backward()
            total += loss.item()
        return total

    def loop(observe: Observe) -> None:
        for step in range(steps):
            if zero_grad:
                zero()
            total = step_once(step)
            if scaler:
                observe(total, scaler)
            if clip:
                for o in optimizers if scaler else ():
                    scaler.unscale_(o)
                nn.utils.clip_grad_norm_([p for _, p in names], clip)
            if not scaler and not observe_late:
                observe(total)
            for o in optimizers:
                if scaler:
                    scaler.step(o)
                else:
                    o.step()
            if scaler:
                scaler.update()
            after(model, step)
            if observe_late:
                zero()
                observe(total)
            for s in schedulers:
                s.step()

    return Training(model, made, loop)


def of(
    build: Callable[[], nn.Module],
    task: Callable[[nn.Module], Callable[[int], Tensor]],
    make_optimizer: Callable[..., Any],
    steps: int,
    **options: Any,
) -> Callable[[], Training]:
    """Return a function that builds the model and its task and makes their training."""

    def make() -> Training:
        model = build()
        return fit(model, task(model), make_optimizer, steps, **options)

    return make
