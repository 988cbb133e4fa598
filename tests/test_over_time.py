"""The health check over time: it names what goes wrong in a training, and is silent otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paramstats
from paramstats import Finding, FindingCode, History, Severity
from tests.findings_models import convolutional, digits, mlp, one_thread, recurrent, transformer

__all__ = ["digits", "one_thread"]  # fixtures

adamw, sgd = torch.optim.AdamW, torch.optim.SGD


class Training:
    """A training of `mlp` on digits, whose methods a test replaces; `run` records its history."""

    steps = 60
    every = 1
    model: nn.Module

    def __init__(self, digits: tuple[Tensor, Tensor], **changes: Any) -> None:
        self.images, self.labels = digits
        for name, value in changes.items():
            setattr(self, name, value)
        torch.manual_seed(0)
        self.model = self.build()
        self.optimizer = self.optimize(self.model)

    build: Callable[[], nn.Module] = staticmethod(mlp)

    @staticmethod
    def optimize(model: nn.Module) -> torch.optim.Optimizer:
        return adamw(model.parameters(), lr=1e-3)

    @staticmethod
    def loss_of(training: Training, step: int, images: Tensor, labels: Tensor) -> Tensor:
        dtype = next(training.model.parameters()).dtype
        return nn.functional.cross_entropy(training.model(images.to(dtype)).float(), labels)

    before_step = after_step = staticmethod(lambda training, step: None)
    zero_grad = staticmethod(lambda training: training.optimizer.zero_grad())
    step_optimizer = staticmethod(lambda training: training.optimizer.step())

    def run(self, **watching: Any) -> History:
        history = History()
        watcher = paramstats.watch(self.model, history=history, every=self.every, **watching)
        for step in range(self.steps):
            rows = torch.randint(0, len(self.images), (64,))
            self.loss_of(self, step, self.images[rows], self.labels[rows]).backward()
            self.before_step(self, step)
            if "optimizer" not in watching:
                watcher.step()
            self.step_optimizer(self)
            self.after_step(self, step)
            self.zero_grad(self)
        watcher.close()
        return history


def alarms(findings: paramstats.Findings) -> list[str]:
    return [f"step {f.step}: {f}" for f in findings.at_least(Severity.WARNING)]


# ---- sick trainings


def all_but_the_second(model: nn.Module) -> torch.optim.Optimizer:
    return adamw([p for name, p in model.named_parameters() if name[0] != "2"], lr=1e-3)


@torch.no_grad()
def clamp(training: Training, step: int) -> None:
    training.model[2].weight.clamp_(-0.05, 0.05)


@torch.no_grad()
def clamp_at_zero(training: Training, step: int) -> None:
    training.model[2].weight.clamp_(min=0)


@torch.no_grad()
def enlarge_one(training: Training, step: int) -> None:
    if step == 40:
        training.model[2].weight.mul_(1000)


@torch.no_grad()
def kill_units(training: Training, step: int) -> None:
    if step >= 30:
        training.model[2].bias[:45] = -100.0


@torch.no_grad()
def kill_layer(training: Training, step: int) -> None:
    if step >= 30:
        training.model[2].bias.fill_(-100.0)


def loss_times(factor: float, at: int) -> Callable[..., Tensor]:
    def loss_of(training: Training, step: int, images: Tensor, labels: Tensor) -> Tensor:
        return Training.loss_of(training, step, images, labels) * (factor if step == at else 1.0)

    return loss_of


def detach(training: Training, step: int, images: Tensor, labels: Tensor) -> Tensor:
    first, rest = training.model[:2], training.model[2:]
    hidden = first(images)
    return nn.functional.cross_entropy(rest(hidden.detach() if step >= 20 else hidden), labels)


def saturate(training: Training, step: int, images: Tensor, labels: Tensor) -> Tensor:
    hidden = training.model[:2](images)
    if step >= 30:
        hidden = torch.tanh(hidden + 5.5)  # whose derivative is below 1e-4
    return nn.functional.cross_entropy(training.model[2:](hidden), labels)


C = FindingCode
SICK: dict[str, tuple[dict[str, Any], FindingCode, str, int]] = {
    # changes of the training; the code, the name and the step at which it begins
    "not in the optimizer": (
        {"optimize": all_but_the_second},
        C.UNCHANGED_PARAMETER,
        "2.weight",
        1,
    ),
    "lr 0": ({"optimize": lambda m: sgd(m.parameters(), lr=0.0)}, C.UNCHANGED_PARAMETER, "", 1),
    "lr 1": (
        {"optimize": lambda m: adamw(m.parameters(), lr=1.0)},
        C.GROWING_WEIGHT,
        "2.weight",
        3,
    ),
    "sgd lr 30": (
        {"optimize": lambda m: sgd(m.parameters(), lr=30)},
        C.LARGE_UPDATE,
        "2.weight",
        1,
    ),
    "weight decay 50": (
        {"optimize": lambda m: adamw(m.parameters(), lr=1e-3, weight_decay=50)},
        C.SHRINKING_WEIGHT,
        "",
        1,
    ),
    "clamped": ({"after_step": clamp}, C.CLAMPED_WEIGHT, "2.weight", 2),
    "clamped at 0": ({"after_step": clamp_at_zero}, C.CLAMPED_WEIGHT, "2.weight", 2),
    "weight x1000": ({"after_step": enlarge_one}, C.LARGE_UPDATE, "2.weight", 41),
    "loss x1000": ({"loss_of": loss_times(1e3, 40)}, C.GRADIENT_SPIKE, "*", 40),
    "loss NaN": ({"loss_of": loss_times(math.nan, 20)}, C.NONFINITE_GRADIENT, "4.bias", 20),
    "dead units": ({"after_step": kill_units}, C.DEAD_UNITS, "2.weight", 31),
    "dead layer": ({"after_step": kill_layer}, C.ZERO_GRADIENT, "2.weight", 31),
    "detached": ({"loss_of": detach}, C.MISSING_GRADIENT, "0.weight", 20),
    "saturated": ({"loss_of": saturate}, C.GRADIENT_COLLAPSE, "0.weight", 30),
    "zero_grad forgotten": ({"zero_grad": lambda t: None}, C.ACCUMULATED_GRADIENT, "", 10),
}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_training_is_named(digits, name):
    changes, code, tensor, step = SICK[name]
    history = Training(digits, **changes).run()
    found = [f for f in history.findings() if f.code == code and f.severity >= Severity.WARNING]
    assert found, history.findings()
    finding = next((f for f in found if tensor in (f.name, "*")), None)
    assert finding is not None, found
    assert finding.step is not None and abs(finding.step - step) <= 2, finding
    assert finding.message and finding.advice


def test_what_left_its_past_first_comes_first(digits):
    """The weight that was damaged precedes the gradients that it changes."""
    findings = Training(digits, after_step=enlarge_one).run().findings()
    assert findings[0].name == "2.weight" and findings[0].source == "param"
    assert [f.step for f in findings if f.severity == Severity.WARNING] == sorted(
        f.step for f in findings if f.severity == Severity.WARNING and f.step is not None
    )


def test_no_gradient_is_a_finding_if_gradients_were_read(digits):
    training = Training(digits, before_step=lambda t, step: t.optimizer.zero_grad())
    found: list[Finding] = []
    with pytest.warns(RuntimeWarning, match="no parameter has a gradient at step 0") as warned:
        history = training.run(on_finding=found.append)
    assert len(warned) == 1
    codes = [(f.code, f.name, f.severity, f.step) for f in found if not f.name]
    assert codes == [(C.MISSING_GRADIENT, "", Severity.WARNING, 0)]
    assert alarms(history.findings()) == [], "a history does not know whether gradients were read"


# ---- healthy trainings


def half_of_the_layers(training: Training, step: int, images: Tensor, labels: Tensor) -> Tensor:
    """Stochastic depth: a layer is skipped in half of the steps."""
    x = training.model[:2](images)
    if torch.rand(()) < 0.5:
        x = x + training.model[2:4](x)
    return nn.functional.cross_entropy(training.model[4](x), labels)


def freeze_in_phases(training: Training, step: int) -> None:
    training.model[0].requires_grad_(step < 20)


@torch.no_grad()
def prune(training: Training, step: int) -> None:
    weight = training.model[2].weight
    weight *= weight.abs() > min(step, 40) / 400


def every_fourth(training: Training) -> None:
    training.micro = getattr(training, "micro", 0) + 1
    if training.micro % 4 == 0:
        training.optimizer.step()
        training.optimizer.zero_grad()


def clip(training: Training, step: int) -> None:
    nn.utils.clip_grad_norm_(training.model.parameters(), 0.1)


def with_target(digits: tuple[Tensor, Tensor]) -> Training:
    """A target network follows the other one slowly, and gets no gradient."""
    build = lambda: nn.ModuleDict({"online": mlp(), "target": mlp()})  # noqa: E731

    def loss_of(training: Training, step: int, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(training.model["online"](images), labels)

    @torch.no_grad()
    def follow(training: Training, step: int) -> None:
        pairs = (training.model[name].parameters() for name in ("target", "online"))
        for slow, fast in zip(*pairs, strict=True):
            slow.lerp_(fast, 0.01)

    return Training(digits, build=build, loss_of=loss_of, after_step=follow)


HEALTHY: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd 0.5": {"optimize": lambda m: sgd(m.parameters(), lr=0.5)},
    "momentum": {"optimize": lambda m: sgd(m.parameters(), lr=0.05, momentum=0.9)},
    "convolutional": {"build": convolutional},
    "recurrent": {"build": recurrent},
    "transformer": {"build": transformer, "steps": 40},
    "bfloat16": {"build": lambda: mlp(torch.bfloat16)},
    "stochastic depth": {"loss_of": half_of_the_layers, "steps": 150},
    "freezing": {"after_step": freeze_in_phases},
    "pruning": {"after_step": prune},
    "accumulation": {"step_optimizer": every_fourth, "zero_grad": lambda t: None},
    "clipping": {"before_step": clip},
    "converging": {"steps": 300, "optimize": lambda m: adamw(m.parameters(), lr=1e-2)},
    "every 10": {"steps": 300, "every": 10},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_training_has_no_alarm(digits, name):
    assert alarms(Training(digits, **HEALTHY[name]).run().findings()) == []


def test_a_target_network_is_no_alarm(digits):
    assert alarms(with_target(digits).run().findings()) == []


def test_a_scaler_that_searches_its_scale_is_no_alarm(digits):
    model = mlp().to(torch.float16)
    history = History()
    for step in range(40):
        for number, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, math.inf if step < 20 else 1e-3 * (1 + (step + number) % 3))
        history.append(step, paramstats.summarize(model, grad_scale=2.0 ** max(0, 40 - step)))
        if step >= 20:
            with torch.no_grad():
                for p in model.parameters():
                    p -= p.grad
    findings = history.findings()
    assert alarms(findings) == []
    assert any(f.code == C.NONFINITE_GRADIENT and f.end == 20 for f in findings)


@pytest.mark.parametrize("missing", ["params", "grads"])
def test_statistics_that_were_not_read_are_no_findings(digits, missing):
    assert alarms(Training(digits).run(**{missing: False}).findings()) == []
