"""What `watch(optimizer=...)` knows of a step: what the optimizer did, and what it did not do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import paramstats
from paramstats import Finding, FindingCode, Severity
from tests.findings_models import one_thread

__all__ = ["one_thread"]  # a fixture

C = FindingCode
adam, adamw, sgd = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 12,
    after_step: Callable[[int], object] = lambda step: None,
    factor: float = 1.0,
    **watching: Any,
) -> list[Finding]:
    found: list[Finding] = []
    watching = {"optimizer": optimizer, "every": 1, **watching}
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(0)
    with paramstats.watch(model, on_finding=found.append, **watching):
        for step in range(steps):
            x = torch.randn(32, 16, generator=generator)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x.to(dtype)).float(), x[:, :4].argmax(1))
            (factor * loss).backward()
            optimizer.step()
            with torch.no_grad():
                after_step(step)
    return found


# ---- NaN that the optimizer has not made


def test_nan_from_before_the_first_step_is_not_blamed_on_the_optimizer():
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    (one,) = train(model, adamw(model.parameters()), 6)
    assert (one.code, one.name, one.step) == (C.NONFINITE_PARAMETER, "2.weight", 0)
    assert one.message.startswith("NaN or Inf before the first step")
    assert "not initialized" in one.advice and "update" not in one.advice


def test_nan_of_the_first_step_is_blamed_on_its_gradients():
    model = mlp()
    found = train(model, adamw(model.parameters()), 6, factor=math.nan)
    assert [(f.code, f.name, f.step) for f in found] == [
        (C.NONFINITE_GRADIENT, "4.bias", 0),
        (C.NONFINITE_PARAMETER, "0.weight", 0),
    ]
    assert found[1].advice.startswith("An optimizer update introduced NaN/Inf")


def test_nan_in_the_first_summary_is_not_blamed_on_the_optimizer():
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    history = paramstats.History()
    for step in range(3):
        model(torch.ones(1, 16)).sum().backward()
        history.append(step, paramstats.summarize(model))
    one = history.findings()[0]
    assert (one.code, one.name) == (C.NONFINITE_PARAMETER, "2.weight")
    assert "not initialized" in one.advice


@pytest.mark.parametrize("in_with", [True, False])
def test_nan_in_the_last_entry_is_reported_by_close(in_with):
    model, found = mlp(), []
    watcher = paramstats.watch(model, every=1, on_finding=found.append)

    def run() -> None:
        for step in range(10):
            model.zero_grad()
            model(torch.ones(1, 16)).sum().backward()
            if step == 9:
                model[0].weight.grad.fill_(math.nan)
            watcher.step()

    if in_with:
        with watcher:
            run()
    else:
        run()
        assert not [f for f in found if f.code is C.NONFINITE_GRADIENT]
        watcher.close()
    watcher.close()
    (one,) = [f for f in found if f.code is C.NONFINITE_GRADIENT]
    assert (one.name, one.step, one.severity) == ("0.weight", 9, Severity.ERROR)


# ---- changes outside of the optimizer


def outside(found: list[Finding]) -> list[tuple[str, int | None]]:
    return [(f.name, f.step) for f in found if f.code is C.CHANGED_OUTSIDE and f.end is None]


@pytest.mark.parametrize(
    "edit",
    [
        lambda w: w.clamp_(-0.1, 0.1),
        lambda w: w.clamp_(min=-0.15),
        lambda w: w.mul_(0.9),
        lambda w: w[0].zero_(),
        lambda w: w.copy_(w / w.norm(dim=1, keepdim=True)),
    ],
)
@pytest.mark.parametrize("optimizer_of", [adamw, adam, lambda p: sgd(p, lr=0.1, momentum=0.9)])
def test_edits_after_the_step_are_found(edit, optimizer_of):
    model = mlp()

    def after_step(step: int) -> None:
        if step >= 4:
            edit(model[2].weight)

    found = train(model, optimizer_of(model.parameters()), after_step=after_step)
    assert outside(found) == [("2.weight", 5)]
    (one,) = [f for f in found if f.code is C.CHANGED_OUTSIDE]
    assert one.severity is Severity.INFO and "optimizer.step()" in one.advice


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("update", ["auto", "copy", "formula"])
@pytest.mark.parametrize(
    "optimizer_of",
    [
        adamw,
        lambda p: adamw(p, lr=1e-6),
        lambda p: adam(p, lr=1e-2, amsgrad=True, weight_decay=0.1),
        lambda p: adamw(p, lr=0.5, weight_decay=1.0),
        lambda p: sgd(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.RMSprop(p, lr=1e-2),
    ],
)
def test_the_optimizer_alone_is_no_change_outside(dtype, update, optimizer_of):
    model = mlp().to(dtype)
    found = train(model, optimizer_of(model.parameters()), 30, update=update)
    assert outside(found) == []


def test_changes_between_due_steps_are_not_changes_outside():
    model = mlp()
    assert outside(train(model, adamw(model.parameters()), 40, every=2)) == []


def test_a_weight_that_something_else_replaces_is_not_a_large_learning_rate():
    model = mlp()

    def after_step(step: int) -> None:
        if step == 8:
            model[2].weight.mul_(1000)

    found = train(model, adamw(model.parameters()), after_step=after_step)
    (one,) = [f for f in found if f.code is C.LARGE_UPDATE and f.step == 9 and f.end is None]
    assert one.name == "2.weight" and one.severity is Severity.WARNING
    assert "learning rate" not in one.advice and "besides the optimizer" in one.advice
    assert outside(found) == [], "it is the same problem"


# ---- eps


@pytest.mark.parametrize(
    ("eps", "severity"), [(1e3, Severity.WARNING), (0.1, Severity.INFO), (1e-8, None)]
)
def test_eps_that_is_too_large_is_named(eps, severity):
    model = mlp()
    optimizer = adamw(model.parameters(), lr=1e-3, eps=eps)
    found = [f for f in train(model, optimizer, 5) if f.code is C.BELOW_EPS]
    assert [f.severity for f in found] == [severity] * (3 if severity else 0)
    for one in found:
        assert one.advice.startswith("Adam's eps is too large for these gradients")
        assert f"below eps {paramstats._core.format.number(eps)}; the gradient is normal" in (
            one.message
        )


def test_a_large_eps_is_information_while_the_learning_rate_is_zero():
    model = mlp()
    found = train(model, adamw(model.parameters(), lr=0.0, eps=1e3), 5)
    assert {f.severity for f in found if f.code is C.BELOW_EPS} == {Severity.INFO}


def test_gradients_that_are_tiny_are_not_blamed_on_eps():
    model = mlp()
    found = train(model, adamw(model.parameters(), lr=1e-3), 5, factor=1e-8)
    found = [f for f in found if f.code is C.BELOW_EPS]
    assert found and {f.severity for f in found} == {Severity.INFO}
    assert all("vanishing gradients" in f.advice for f in found)


# ---- gradients that are cleared too early


@pytest.mark.parametrize("layers", [1, 3, 10])
def test_gradients_that_are_zeroed_before_the_watcher_steps(layers):
    torch.manual_seed(0)
    model, found = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))), []
    optimizer = adamw(model.parameters())
    with paramstats.watch(model, every=1, on_finding=found.append) as watcher:
        for _ in range(20):
            model(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            watcher.step()
    (one,) = found
    assert (one.code, one.name, one.severity) == (C.ZERO_GRADIENT, "", Severity.WARNING)
    assert one.step == 0 and "probably called after zero_grad()" in one.advice


def test_a_summary_of_zero_gradients_says_when_to_call_it():
    model = mlp()
    model(torch.ones(1, 16)).sum().backward()
    model.zero_grad(set_to_none=False)
    (one,) = paramstats.summarize(model).findings()
    assert one.code is C.ZERO_GRADIENT and "before zero_grad()" in one.advice


def test_the_warning_shows_the_line_that_called_step():
    model = mlp()
    watcher = paramstats.watch(model, lambda *_: None, every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watcher.step()
    (one,) = [w for w in caught if "no parameter has a gradient" in str(w.message)]
    assert one.filename == __file__
