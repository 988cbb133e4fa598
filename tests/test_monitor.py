"""The object that finds what changes over time: its state, its cost, and what it reports when."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paramstats
from paramstats import Finding, History, Thresholds
from paramstats._findings import Findings
from paramstats._findings.over_time import Monitor, persistent
from paramstats._summary import record_of
from tests.findings_models import digits, one_thread
from tests.test_over_time import SICK, C, Training, alarms, loss_times

__all__ = ["digits", "one_thread"]  # fixtures


@pytest.mark.parametrize("name", ["loss x1000", "loss NaN", "dead units", "clamped", "lr 1"])
def test_a_history_finds_what_is_found_while_training(digits, name):
    found: list[Finding] = []
    history = Training(digits, **SICK[name][0]).run(on_finding=found.append)
    lasting = {f for f in found if f.end is None}
    for finding in found:
        if finding.end is not None:
            (begin,) = [f for f in lasting if f == dataclasses.replace(finding, end=None)]
            lasting = (lasting - {begin}) | {finding}
    assert lasting and lasting <= set(history.findings())


def replay(entries: list[tuple[int, Any]], **arguments: Any) -> tuple[Monitor, list[Finding]]:
    monitor = Monitor(Thresholds(), **arguments)
    found = [f for step, summary in entries for f in monitor.add(step, record_of(summary))]
    return monitor, found


def test_every_finding_is_reported_once_and_ends_once(digits):
    history = Training(digits, loss_of=loss_times(1e3, 30), steps=80).run()
    _, found = replay(list(history))
    spikes = [f for f in found if f.code == C.GRADIENT_SPIKE]
    assert [f.end is None for f in spikes[:2]] == [True, False]
    assert spikes[0].step == 30 and spikes[1].end is not None and spikes[1].end > 30
    keys = [(f.code, f.name, f.severity, f.step, f.end is None) for f in found]
    assert len(keys) == len(set(keys))


def test_a_flickering_condition_is_reported_once():
    """A weight that jumps in every second entry has one finding that lasts."""
    model, history = nn.Linear(8, 8), History()
    for step in range(40):
        model.weight.grad = torch.randn(8, 8)
        with torch.no_grad():
            model.weight.mul_(3.0 if step % 2 else 1 / 3)
        history.append(step, paramstats.summarize(model))
    _, found = replay(list(history))
    large = [f for f in found if f.code == C.LARGE_UPDATE]
    assert len(large) == 1, large


def test_entries_may_have_other_tensors(digits):
    """Each of two optimizers makes its own steps; a layer is added, another one is renamed."""
    history = Training(digits, loss_of=loss_times(1e3, 41), steps=60).run()
    parts = ("^[02]", "^4", "^[04]", "^[0-4]")
    entries = [
        (step, summary.filter(pattern))
        for (step, summary), pattern in zip(history, itertools.cycle(parts))
    ]
    monitor, found = replay(entries)
    assert {f.step for f in found if f.code == C.GRADIENT_SPIKE} == {41}
    begun = [dataclasses.replace(f, end=None) for f in monitor.findings()]
    assert set(alarms(Findings(begun))) == {f"step {f.step}: {f}" for f in found if not f.end}


def test_a_run_that_goes_back_begins_anew(digits):
    history = Training(digits, loss_of=loss_times(math.nan, 20), steps=30).run()
    monitor, found = replay(list(history))
    assert found
    first = next(iter(history))[1]
    ended = monitor.add(10, record_of(first))
    assert {f.step for f in ended} == {20, 21} and all(f.end == 30 for f in ended), "after step 29"
    assert monitor.add(11, record_of(first)) == []


def test_the_work_and_the_state_do_not_grow_with_the_entries(digits, monkeypatch):
    entries = list(Training(digits, steps=40).run())
    summaries = [summary for _, summary in entries]
    runs = []
    find = persistent.find
    monkeypatch.setattr(persistent, "find", lambda *args: runs.append(1) or find(*args))
    sizes, monitor = [], Monitor(Thresholds())
    for step in range(1000):
        monitor.add(step, record_of(summaries[step % 40]))
        if step % 100 == 99:
            sizes.append(size(vars(monitor)))
    assert max(sizes[1:]) <= sizes[0] + 2000, sizes  # ended findings
    assert len(runs) <= 150


def size(x: Any) -> int:
    """Return the number of tensor elements and objects in an object."""
    if isinstance(x, Tensor):
        return x.numel()
    if isinstance(x, dict):
        return sum(map(size, x.values()))
    if isinstance(x, (list, tuple, set)) or type(x).__name__ == "deque":
        return sum(map(size, x))
    return sum(map(size, vars(x).values())) if type(x).__module__.startswith("paramstats") else 1


def test_thresholds_can_be_changed(digits):
    history = Training(digits, loss_of=loss_times(1e3, 40)).run()
    assert alarms(history.findings(spike=1e9)) == []
    assert alarms(history.findings({"spike": 1e9})) == []
    with pytest.raises(TypeError, match="did you mean 'spike'"):
        history.findings(spikes=1.0)


def test_an_empty_history_has_no_findings():
    assert History().findings() == ()
    history = History()
    history.append(0, paramstats.summarize({}))
    history.append(1, paramstats.summarize({"w": torch.ones(0)}))
    assert history.findings() == ()


def test_freezing_a_parameter_ends_its_findings():
    """A parameter that never changes, until it is frozen as the advice says."""
    model, history = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), History()
    for step in range(40):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        with torch.no_grad():
            model[0].weight += 0.01 * torch.randn(8, 8)
        if step == 25:
            model[1].requires_grad_(False)
        history.append(step, paramstats.summarize(model))
    found = {f.name: f.end for f in history.findings() if f.code == C.UNCHANGED_PARAMETER}
    assert found["0.bias"] is None and found["1.weight"] == found["1.bias"] == 25


def test_a_gradient_that_becomes_zero_is_a_warning():
    """Single summaries say INFO; that must not hide that it lasts."""
    for begin in (3, 30):
        model, history = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), History()
        for step in range(60):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            if step >= begin:
                model[1].weight.grad.zero_()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.01 * torch.randn_like(parameter)
            history.append(step, paramstats.summarize(model))
        found = [f for f in history.findings() if f.code == C.ZERO_GRADIENT and f.end is None]
        assert [(f.name, f.severity.name) for f in found] == [("1.weight", "WARNING")]


def test_a_threshold_of_zero(digits):
    history = Training(digits, loss_of=loss_times(1e3, 30), steps=40).run()
    assert C.GRADIENT_COLLAPSE not in {f.code for f in history.findings(gradient_collapse=0)}
    assert C.GRADIENT_SPIKE in {f.code for f in history.findings(spike=0)}


def test_findings_of_parameters_that_are_removed_end():
    history, names = History(), [f"{i}.weight" for i in range(3)]
    for step in range(60):
        model = {name: nn.Parameter(torch.randn(8, 8)) for name in names}
        model[names[-1]] = nn.Parameter(torch.full((8, 8), 0.5))  # a constant weight
        if step >= 30:
            del model[names[-1]]
        for weight in model.values():
            weight.grad = torch.randn(8, 8)
        history.append(step, paramstats.summarize(model))
    constant = [f for f in history.findings() if f.code == C.CONSTANT_WEIGHT]
    assert [(f.name, f.step) for f in constant] == [("2.weight", 0)]
    assert constant[0].end is not None and 30 < constant[0].end <= 50
