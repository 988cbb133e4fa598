"""`watch(on_finding=...)` is called once for one cause, however many tensors it concerns."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import paramstats
from paramstats import Finding, FindingCode, Severity

C = FindingCode


def layers(n: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(n)))


@torch.no_grad()
def constant(layer: nn.Linear, step: int) -> None:
    layer.weight.fill_(0.5)


@torch.no_grad()
def unchanged(layer: nn.Linear, step: int) -> None:
    layer.weight.copy_(torch.eye(8))


def without_gradient(layer: nn.Linear, step: int) -> None:
    layer.weight.grad = layer.bias.grad = None


def zero_gradient(layer: nn.Linear, step: int) -> None:
    layer.weight.grad.zero_()


@torch.no_grad()
def thousandfold(layer: nn.Linear, step: int) -> None:
    if step == 20:
        layer.weight.mul_(1000)


def train(
    model: nn.Sequential, sick: slice, edit: Callable[[nn.Linear, int], None], steps: int = 40
) -> tuple[list[Finding], paramstats.History]:
    """Change all parameters and gradients in each step, and then some layers by `edit`."""
    found: list[Finding] = []
    history = paramstats.History()
    watcher = paramstats.watch(model, every=1, on_finding=found.append, history=history)
    for step in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
            with torch.no_grad():
                p += 0.01 * torch.randn_like(p)
        for layer in model[sick]:
            edit(layer, step)
        watcher.step()
    watcher.close()
    return found, history


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (constant, C.CONSTANT_WEIGHT),
        (unchanged, C.UNCHANGED_PARAMETER),
        (without_gradient, C.MISSING_GRADIENT),
        (zero_gradient, C.ZERO_GRADIENT),
        (thousandfold, C.LARGE_UPDATE),
    ],
)
def test_many_tensors_with_one_problem_are_one_finding(edit, code):
    found, history = train(layers(10), slice(0, 9), edit)
    one = [f for f in found if f.code is code]
    assert [f.name for f in one if f.end is None] == [""], one
    assert " of 10 weights" in one[0].message or " of 20 parameters" in one[0].message
    assert "0.weight" in one[0].message and " more" in one[0].message
    assert len(one[0].message) < 400
    assert [f for f in history.findings() if f.code is code and f.end is None] in ([], one[:1])


@pytest.mark.parametrize("sick", [slice(0, 3), slice(1, 6)])
def test_a_few_tensors_have_a_finding_each(sick):
    found, _ = train(layers(10), sick, constant)
    names = [f.name for f in found if f.code is C.CONSTANT_WEIGHT]
    assert names == [f"{i}.weight" for i in range(10)[sick]]


def test_many_tensors_that_are_not_most_have_the_name_of_the_first():
    found, _ = train(layers(20), slice(4, 11), constant)
    (one,) = [f for f in found if f.code is C.CONSTANT_WEIGHT]
    assert one.name == "4.weight"
    assert one.message.endswith(
        "7 of 20 weights: " + ", ".join(f"{i}.weight" for i in range(4, 11))
    )


def test_every_tensor_is_in_the_findings_of_the_summary():
    _, history = train(layers(10), slice(0, 9), constant, steps=2)
    findings = list(history)[-1][1].findings()
    assert [f.name for f in findings] == [f"{i}.weight" for i in range(9)]


def test_a_finding_of_many_tensors_ends_with_the_last():
    def constant_at_first(layer: nn.Linear, step: int) -> None:
        if step < (40 if layer is last else 20):
            constant(layer, step)

    model = layers(10)
    last = model[8]
    found, _ = train(model, slice(0, 9), constant_at_first, steps=200)
    begin, end = (f for f in found if f.code is C.CONSTANT_WEIGHT)
    assert begin.name == end.name == "" and begin.end is None
    assert end.end is not None and end.end > 40


def test_many_gradients_with_nan_are_one_finding():
    def nan(layer: nn.Linear, step: int) -> None:
        if step == 30:
            layer.weight.grad.fill_(math.nan)
            layer.bias.grad.fill_(math.nan)

    found, _ = train(layers(15), slice(0, 15), nan, steps=31)
    (one,) = [f for f in found if f.code is C.NONFINITE_GRADIENT]
    assert (one.name, one.step, one.severity) == ("14.bias", 30, Severity.ERROR)
    assert "the first of 30 of 30 gradients" in one.message


def test_buffers_with_nan_are_one_finding():
    model = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(10)))
    found: list[Finding] = []
    watcher = paramstats.watch(model, every=1, on_finding=found.append, buffers=True)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.fill_(math.nan)
    model(torch.randn(2, 4)).sum().backward()
    watcher.step()
    assert len([f for f in found if f.source == "buffer"]) == 1


@pytest.mark.parametrize("last", [3, 14])
def test_what_explains_another_finding_replaces_it(last):
    """A parameter that no optimizer has never changes: that is one problem."""
    model, found = layers(20), []
    optimizer = torch.optim.SGD(model[last:].parameters(), lr=1e-3)
    with paramstats.watch(model, every=1, on_finding=found.append, optimizer=optimizer):
        for _ in range(30):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
    codes = {f.code for f in found}
    assert C.FORGOTTEN_PARAMETER in codes and C.UNCHANGED_PARAMETER not in codes


def test_a_detached_graph_is_one_finding():
    model, found = layers(12), []
    watcher = paramstats.watch(model, every=1, on_finding=found.append)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(40):
        hidden = model[:8](torch.randn(16, 8))
        model[8:](hidden.detach() if step >= 20 else hidden).square().mean().backward()
        watcher.step()
        optimizer.step()
        optimizer.zero_grad()
    watcher.close()
    (one,) = [f for f in found if f.severity >= Severity.WARNING]
    assert (one.code, one.name, one.step) == (C.MISSING_GRADIENT, "", 20)
    assert one.message.endswith("and 8 more") and "16 of 24 parameters" in one.message
    assert "'8.weight'" in one.advice
