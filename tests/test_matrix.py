"""The quick rows of the real-world matrix, and that a row can fail."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch

import paramstats
from paramstats._core import moments
from tools.matrix.looking import Look, same_training
from tools.matrix.rows import ROWS, Row, run_row

for theme in ("training", "wrappers", "numbers", "processes"):
    importlib.import_module(f"tools.matrix.{theme}")
QUICK = [row for row in ROWS if row.quick]


@pytest.mark.parametrize("row", QUICK, ids=lambda row: row.name)
def test_row(backend, row):
    outcome = run_row(row, [backend])
    if outcome.not_run:
        pytest.skip(outcome.not_run)
    assert not outcome.failures


# ---- a row can fail --------------------------------------------------------------------------


def failure_of(backend, run, *needs: str) -> str:
    outcome = run_row(Row("", "wrappers", needs, True, run), [backend])
    assert not outcome.not_run
    return outcome.failures.get(backend.name, "")


def trained() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.BatchNorm1d(6))
    model(torch.randn(5, 8)).square().sum().backward()
    return model


@pytest.mark.parametrize(
    "statistic", ["mean", "std", "norm", "zero_fraction", "min", "max", "count"]
)
@pytest.mark.parametrize("which", [0, 2, 4])
def test_a_wrong_figure_fails(backend, monkeypatch, statistic, which):
    """Of a parameter, of a gradient, of a buffer: the `which`-th of all that are made."""
    model, finalize, made = trained(), moments.finalize, []

    def wrong(state, correction):
        statistics = finalize(state, correction)
        made.append(statistics)
        value = getattr(statistics, statistic)
        change = {statistic: value + 1e-3 * max(abs(value), 1e-3)} if statistic != "count" else {
            statistic: value + 1}  # fmt: skip
        return statistics._replace(**change) if len(made) == which + 1 else statistics

    monkeypatch.setattr(moments, "finalize", wrong)
    assert "AssertionError" in failure_of(backend, lambda look: look(model))
    made.clear()
    made.extend([None] * 1000)
    assert not failure_of(backend, lambda look: look(model))


@pytest.mark.parametrize(
    ("meddle", "message"),
    [
        (lambda model: model[0].weight.data.add_(1), "'0.weight': "),
        (lambda model: model[0].weight.grad.zero_(), "changed something"),
        (lambda model: model.zero_grad(), "changed something"),
        (lambda model: torch.rand(1), "changed something"),
        (lambda model: warnings.warn("look here", stacklevel=1), "warned: look here"),
    ],
)
def test_a_call_that_does_more_than_read_fails(backend, monkeypatch, meddle, message):
    summarize = paramstats.summarize

    def meddling(model, **arguments):
        summary = summarize(model, **arguments)
        meddle(model)
        return summary

    monkeypatch.setattr(paramstats, "summarize", meddling)
    assert message in failure_of(backend, lambda look: look(trained()))


def test_a_training_that_goes_another_way_fails(backend):
    def train(observe):
        model = trained()
        if isinstance(observe, Look):
            with torch.no_grad():
                model[0].weight += 1e-7
        return model

    assert "another way" in failure_of(backend, lambda look: same_training(look, train))


def test_entries_that_lack_or_are_too_many_fail(backend, monkeypatch):
    summarize = paramstats.summarize
    for arguments in ({"exclude": "0.bias"}, {"grads": False}, {"buffers": False}):

        def other(model, arguments=arguments, **given):
            return summarize(model, **(given | arguments))

        monkeypatch.setattr(paramstats, "summarize", other)
        assert "AssertionError" in failure_of(backend, lambda look: look(trained()))


def test_what_is_refused_or_skipped_must_be_said(backend):
    def refuse(look):
        look.refused(lambda: paramstats.summarize(3), TypeError, "got float")

    assert "no 'got float' in" in failure_of(backend, refuse)
    assert "nothing was raised" in failure_of(
        backend, lambda look: look.refused(lambda: None, TypeError)
    )
    opaque = torch.arange(4, dtype=torch.uint8).view(torch.uint4)
    assert "skipped" in failure_of(backend, lambda look: look({"x": opaque}))


def test_a_row_whose_library_lacks_is_not_run(backend):
    outcome = run_row(Row("", "wrappers", ("no_such_library",), True, trained), [backend])
    assert outcome.of(backend.name) == (
        "not run: no_such_library is not installed; make matrix installs it"
    )
    nothing = run_row(Row("", "wrappers", (), True, lambda look: None), [backend])
    assert nothing.failures[backend.name] == "the row compared nothing"
