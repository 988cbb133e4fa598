"""`watch(on_finding=...)`: when it is called, and what it costs a due step."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import paramstats
from paramstats import Finding, FindingCode, Severity
from paramstats import _watcher as watchers
from tests.integrations.deferred import defer_summaries_of_watch


def spike(model: nn.Module, step: int) -> None:
    """Set gradients whose norm grows by 1,000 at step 10, for three steps."""
    for number, p in enumerate(model.parameters()):
        p.grad = torch.ones_like(p) * (1 + (step + number) % 3) * (1e3 if 10 <= step < 13 else 1)


def run(steps: int, events: list[Any], **watching: Any) -> paramstats.History:
    model, history = nn.Linear(4, 4), paramstats.History()
    watcher = paramstats.watch(model, history=history, every=1, **watching)
    for step in range(steps):
        events.append(step)
        spike(model, step)
        watcher.step()
        with torch.no_grad():
            for p in model.parameters():
                p += 1e-3
    watcher.close()
    return history


def test_it_is_called_after_log_when_a_finding_begins_and_when_it_ends():
    events: list[Any] = []
    history = run(
        30,
        events,
        log=lambda scalars, step: events.append(("log", step)),
        on_finding=lambda f: events.append((f.code, f.name, f.step, f.end)),
    )
    code = FindingCode.GRADIENT_SPIKE
    at = events.index((code, "weight", 10, None))
    assert events[at - 2 : at] == [10, ("log", 10)]
    ended = [event for event in events[at + 1 :] if isinstance(event, tuple) and event[0] is code]
    assert ended == [(code, "weight", 10, 15)]
    assert [f.end for f in history.findings() if f.code == code] == [15]


def test_log_and_history_are_not_needed():
    found: list[Finding] = []
    model = nn.Linear(4, 4)
    with paramstats.watch(model, every=1, on_finding=found.append) as watcher:
        for step in range(14):
            spike(model, step)
            watcher.step()
    assert FindingCode.GRADIENT_SPIKE in {f.code for f in found}


def test_what_it_raises_ends_the_training_and_is_not_repeated():
    model, calls = nn.Linear(4, 4), []

    def stop(finding: Finding) -> None:
        calls.append(finding)
        if finding.severity >= Severity.WARNING:
            raise RuntimeError("stop the training")

    watcher = paramstats.watch(model, every=1, on_finding=stop)
    for step in range(14):
        spike(model, step)
        if step == 10:
            with pytest.raises(RuntimeError, match="stop the training"):
                watcher.step()
        else:
            watcher.step()
    watcher.close()
    assert len(calls) == len(set(calls))


def test_a_failing_log_loses_no_finding():
    model, found = nn.Linear(4, 4), []

    def log(scalars: dict[str, float], step: int) -> None:
        if step == 10:
            raise OSError("no connection")

    watcher = paramstats.watch(model, log, every=1, on_finding=found.append)
    for step in range(12):
        spike(model, step)
        if step == 10:
            with pytest.raises(OSError, match="no connection"):
                watcher.step()
        else:
            watcher.step()
    assert [f.step for f in found if f.code == FindingCode.GRADIENT_SPIKE] == [10]


def test_it_may_close_the_watcher():
    model, found = nn.Linear(4, 4), []
    watcher = paramstats.watch(
        model, every=1, on_finding=lambda f: (found.append(f), watcher.close())
    )
    for step in range(14):
        spike(model, step)
        watcher.step()
    assert found


def test_pending_statistics_are_checked_when_they_are_available(monkeypatch):
    """As on a GPU: the summary of a step is checked at the next call."""
    transfers = defer_summaries_of_watch(monkeypatch)
    model, found = nn.Linear(4, 4), []
    watcher = paramstats.watch(model, every=1, on_finding=lambda f: found.append((step, f.step)))
    for step in range(12):
        spike(model, step)
        watcher.step()
        assert transfers[-1].waits == 0, "the loop waited"
    watcher.close()
    assert (11, 10) in found and (10, 10) not in found


def test_only_the_first_rank_calls_it(monkeypatch):
    found: list[Finding] = []
    monkeypatch.setattr(watchers, "is_first_rank", lambda: False)
    run(14, [], on_finding=found.append)
    assert found == []


def test_steps_of_the_optimizer_are_checked():
    found: list[Finding] = []
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with paramstats.watch(model, every=1, on_finding=found.append, optimizer=optimizer):
        for step in range(14):
            spike(model, step)
            optimizer.step()
    assert FindingCode.GRADIENT_SPIKE in {f.code for f in found}


def test_separate_optimizers_are_checked():
    found: list[Finding] = []
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    optimizers = [torch.optim.SGD(part.parameters(), lr=1e-3) for part in model.values()]
    watcher = paramstats.watch(model, every=1, on_finding=found.append)
    watcher.separate(optimizers)
    for step in range(14):
        for part, optimizer in zip(model.values(), optimizers, strict=True):
            spike(part, step)
            watcher.step(optimizer=optimizer)
            optimizer.step()
    watcher.close()
    assert [(f.name, f.step) for f in found if f.code == FindingCode.GRADIENT_SPIKE]


@pytest.mark.parametrize("arguments", [{"log": lambda *_: None}, {"history": paramstats.History()}])
def test_missing_gradients_are_a_warning_once(arguments):
    model = nn.Linear(4, 4)
    watcher = paramstats.watch(model, every=1, **arguments)
    with pytest.warns(RuntimeWarning, match="no parameter has a gradient at step 0"):
        watcher.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watcher.step()


@pytest.mark.parametrize("why", ["gradient", "frozen", "grads=False"])
def test_other_models_give_no_warning(why):
    model = nn.Linear(4, 4)
    if why == "gradient":
        model.bias.grad = torch.ones(4)
    model.requires_grad_(why != "frozen")
    watcher = paramstats.watch(model, lambda *_: None, every=1, grads=why != "grads=False")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watcher.step()


def test_health_reads_rows_and_distributions():
    model = nn.Linear(4, 4)
    model.bias.grad = torch.ones(4)
    watcher = paramstats.watch(model, lambda *_: None, every=1, health=True, rows="bias")
    watcher.step()
    entry = watcher.summary["weight"]
    assert entry.rows is not None and entry.histogram is not None


def test_closing_passes_the_findings_that_an_error_held_back():
    model = {f"{i}.weight": torch.nn.Parameter(torch.full((8, 8), 0.5)) for i in range(3)}
    names: list[str] = []

    def on_finding(finding: Finding) -> None:
        names.append(finding.name)
        if len(names) == 1:
            raise RuntimeError("stop")

    watcher = paramstats.watch(model, every=1, on_finding=on_finding)
    for weight in model.values():
        weight.grad = torch.randn(8, 8)
    with pytest.raises(RuntimeError, match="stop"):
        watcher.step()
    watcher.close()
    assert sorted(names) == sorted(model)
