"""The health check over time asks for evidence: each case here was once missed or a false alarm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paramstats import Finding, FindingCode, Severity
from tests.findings_models import digits, mlp, one_thread
from tests.test_over_time import Training, adamw, alarms, sgd

__all__ = ["digits", "one_thread"]  # fixtures

C = FindingCode
cross_entropy = nn.functional.cross_entropy


def blocked_after_two_layers(t: Training, step: int, images: Tensor, labels: Tensor) -> Tensor:
    hidden = t.model[:4](images)
    if step >= 30:
        hidden = hidden.detach() + 1e-8 * (hidden - hidden.detach())
    return cross_entropy(t.model[4](hidden), labels)


def with_tiny_layer() -> nn.Module:
    model = mlp()
    nn.init.normal_(model[2].weight, std=1e-4)
    nn.init.zeros_(model[2].bias)
    return model


def zero_grad_but_of_the_last(t: Training) -> None:
    t.model[:4].zero_grad()


SICK: dict[str, tuple[dict[str, Any], FindingCode, list[str]]] = {
    # changes of the training; the code and the names
    "no optimizer step, every 10": (
        {"step_optimizer": lambda t: None, "every": 10, "steps": 50},
        C.UNCHANGED_PARAMETER,
        [""],
    ),
    "two of three layers blocked": (
        {"loss_of": blocked_after_two_layers},
        C.GRADIENT_COLLAPSE,
        ["2.weight", "0.weight"],
    ),
    "zero_grad forgotten for one layer": (
        {
            "zero_grad": zero_grad_but_of_the_last,
            "optimize": lambda m: sgd(m.parameters(), lr=0.01),
        },
        C.ACCUMULATED_GRADIENT,
        ["4.weight"],
    ),
    "one tiny layer": (
        {"build": with_tiny_layer, "optimize": lambda m: sgd(m.parameters(), lr=0.05)},
        C.VANISHING_GRADIENT,
        ["2.weight"],
    ),
}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_training_is_named(digits, name):
    changes, code, names = SICK[name]
    findings = Training(digits, **changes).run().findings()
    assert [f.name for f in findings if f.code is code and f.severity == Severity.WARNING] == names


def every_twelfth(t: Training, step: int, images: Tensor, labels: Tensor) -> Tensor:
    """A second task, which has a layer of its own."""
    hidden = t.model[:2](images)
    if step % 12 == 0:
        hidden = hidden + t.model[2:4](hidden)
    return cross_entropy(t.model[4](hidden), labels)


def missing_after_three(t: Training, step: int, images: Tensor, labels: Tensor) -> Tensor:
    """Stochastic depth: by chance, a layer is skipped in entries 4 to 7 of 12."""
    hidden = t.model[:2](images)
    if step // 5 not in (3, 4, 5, 6):
        hidden = hidden + t.model[2:4](hidden)
    return cross_entropy(t.model[4](hidden), labels)


def predict_zero(t: Training, step: int, images: Tensor, labels: Tensor) -> Tensor:
    return t.model(torch.randn(64, 16)).square().mean()


def noise(t: Training, step: int, images: Tensor, labels: Tensor) -> Tensor:
    """A loss whose gradients have no common direction: sums of n of them grow like sqrt(n)."""
    return (t.model(images) * torch.randn(64, 10)).mean()


def every_eighteenth(t: Training) -> None:
    t.micro = getattr(t, "micro", 0) + 1
    if t.micro % 18 == 0:
        t.optimizer.step()
        t.optimizer.zero_grad()


HEALTHY: dict[str, dict[str, Any]] = {
    "rare task": {"loss_of": every_twelfth},
    "skipped by chance": {"loss_of": missing_after_three, "every": 5},
    "weights fall because of the loss": {
        "build": lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)),
        "loss_of": predict_zero,
        "optimize": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2),
    },
    "accumulation over 18": {
        "loss_of": noise,
        "step_optimizer": every_eighteenth,
        "zero_grad": lambda t: None,
    },
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_training_has_no_alarm(digits, name):
    assert alarms(Training(digits, **HEALTHY[name]).run().findings()) == []


def only(findings: list[Finding], code: FindingCode, name: str) -> Finding:
    found = [f for f in findings if f.code is code and f.severity == Severity.WARNING]
    (finding,) = (f for f in found if f.name == name)
    return finding


def test_a_branch_that_an_optimizer_has_and_that_never_has_a_gradient(digits):
    def build() -> nn.Module:
        text = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 10))
        return nn.ModuleDict({"image": nn.Linear(64, 10), "text": text})

    def loss_of(t: Training, step: int, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            text = t.model["text"](labels)
        return (t.model["image"](images) - text).square().mean()

    training = Training(digits, build=build, loss_of=loss_of)
    found: list[Finding] = []
    training.run(optimizer=training.optimizer, on_finding=found.append)
    warnings = [f for f in found if f.severity == Severity.WARNING]
    assert [f.name for f in warnings] == ["text.0.weight", "text.1.weight", "text.1.bias"]
    assert all(f.code is C.MISSING_GRADIENT and "'text'" in f.message for f in warnings)


def test_infinities_are_one_finding(digits):
    @torch.no_grad()
    def break_one(t: Training, step: int) -> None:
        if step == 20:
            t.model[2].weight[0, 0] = math.inf

    findings = Training(digits, after_step=break_one, steps=30).run().findings()
    codes = {f.code for f in findings.at_least(Severity.WARNING)}
    assert codes <= {C.NONFINITE_PARAMETER, C.NONFINITE_GRADIENT}, findings


def test_messages_state_what_was_seen(digits):
    def skip(t: Training, step: int, images: Tensor, labels: Tensor) -> Tensor:
        hidden = t.model[:2](images)
        if step < 20:
            hidden = hidden + t.model[2:4](hidden)
        return cross_entropy(t.model[4](hidden), labels)

    findings = Training(digits, loss_of=skip).run().findings()
    assert "20 of 20 earlier" in only(findings, C.MISSING_GRADIENT, "2.weight").message

    def zero_bias() -> nn.Module:
        model = mlp()
        nn.init.zeros_(model[2].bias)
        return model

    rest = lambda m: adamw([*m[0].parameters(), *m[4].parameters()], lr=1e-3)  # noqa: E731
    findings = Training(digits, build=zero_bias, optimize=rest).run().findings()
    assert "inf" not in only(findings, C.UNCHANGED_PARAMETER, "2.bias").message


def test_a_learning_rate_of_0_is_said(digits):
    def optimize(model: nn.Module) -> torch.optim.Optimizer:
        groups = [{"params": model[2].parameters(), "lr": 0.0}, {"params": model[4].parameters()}]
        return adamw([*groups, {"params": model[0].parameters()}], lr=1e-3, weight_decay=0)

    training = Training(digits, optimize=optimize)
    findings = training.run(optimizer=training.optimizer).findings()
    assert any("learning rate of this parameter is 0" in f.message for f in findings), findings
    training = Training(digits, optimize=lambda m: sgd(m.parameters(), lr=0.0))
    finding = only(training.run(optimizer=training.optimizer).findings(), C.UNCHANGED_PARAMETER, "")
    assert finding.message.endswith("the learning rate is 0")


def test_a_weight_that_is_set_to_zero_is_not_called_a_decay(digits):
    @torch.no_grad()
    def shrink(t: Training, step: int) -> None:
        if step >= 20:
            t.model[2].weight.copy_(torch.linspace(-1e-3, 1e-3, 4096).view(64, 64))
            t.model[2].weight[0, 0] = step * 1e-4

    findings = Training(digits, after_step=shrink, steps=40).run().findings()
    assert "in-place edits" in only(findings, C.SHRINKING_WEIGHT, "2.weight").advice
