"""Runs the quick rows of the compatibility matrix, and checks that a row can fail."""

from __future__ import annotations

import dataclasses
import importlib
import warnings

import pytest
import torch

import paramstats
from tools.matrix.checker import Checker, same_training
from tools.matrix.rows import ROWS, Row, run_row

for theme in ("training", "wrappers", "numbers"):
    importlib.import_module(f"tools.matrix.{theme}")


@pytest.mark.parametrize("row", [row for row in ROWS if row.quick], ids=lambda row: row.name)
def test_row(backend, row):
    outcome = run_row(row, [backend])
    if outcome.not_run:
        pytest.skip(outcome.not_run)
    assert not outcome.failures


def failure_of(backend, run, *needs: str) -> str:
    return run_row(Row("", "wrappers", needs, True, run), [backend]).failures.get(backend.name, "")


def trained() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.BatchNorm1d(6))
    model(torch.randn(5, 8)).square().sum().backward()
    return model


@pytest.mark.parametrize("index", [0, 2, 4], ids=["param", "grad", "buffer"])
@pytest.mark.parametrize("statistic", ["mean", "std", "norm", "zero_fraction", "min", "max"])
def test_a_wrong_statistic_fails(backend, statistic, index):
    """The `index`-th tensor or gradient whose statistics are read get an error of 0.1 %."""
    model, rows = trained(), []

    def finalize_row(table, row, *numbers):
        statistics = backend.finalize_row(table, row, *numbers)
        if (table, row) not in rows:
            rows.append((table, row))
        if rows.index((table, row)) != index:
            return statistics
        value = getattr(statistics, statistic)
        return statistics._replace(**{statistic: value + 1e-3 * max(abs(value), 1e-3)})

    def one_statistic(table, row, column, *numbers):
        return finalize_row(table, row, *numbers)[column]

    wrong = dataclasses.replace(backend, finalize_row=finalize_row, statistic=one_statistic)
    assert "AssertionError" in failure_of(wrong, lambda check: check(model))
    assert len(rows) > index


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model[0].weight.data.add_(1), "'0.weight': "),
        (lambda model: model[0].weight.grad.zero_(), "changed something"),
        (lambda model: model.zero_grad(), "changed something"),
        (lambda model: torch.rand(1), "changed something"),
        (lambda model: warnings.warn("a warning", stacklevel=1), "warned: a warning"),
    ],
)
def test_a_call_that_changes_something_fails(backend, monkeypatch, change, message):
    summarize = paramstats.summarize

    def changing(model, **arguments):
        summary = summarize(model, **arguments)
        change(model)
        return summary

    monkeypatch.setattr(paramstats, "summarize", changing)
    assert message in failure_of(backend, lambda check: check(trained()))


@pytest.mark.parametrize("arguments", [{"exclude": "0.bias"}, {"grads": False}, {"buffers": False}])
def test_missing_entries_fail(backend, monkeypatch, arguments):
    summarize = paramstats.summarize
    monkeypatch.setattr(
        paramstats, "summarize", lambda m, **given: summarize(m, **given | arguments)
    )
    assert "AssertionError" in failure_of(backend, lambda check: check(trained()))


def test_a_different_training_fails(backend):
    def train(observe):
        model = trained()
        if isinstance(observe, Checker):
            model[0].weight.data += 1e-7
        return model

    assert "not the same" in failure_of(backend, lambda check: same_training(check, train))


def test_an_unexpected_error_or_skip_fails(backend):
    def refuse(call):
        return failure_of(backend, lambda check: check.refused(call, TypeError, "got float"))

    assert "no 'got float' in" in refuse(lambda: paramstats.summarize(3))
    assert "nothing was raised" in refuse(lambda: None)
    opaque = torch.arange(4, dtype=torch.uint8).view(torch.uint4)
    assert "skipped" in failure_of(backend, lambda check: check({"x": opaque}))
    assert failure_of(backend, lambda check: None) == "the row compared nothing"


def test_a_row_without_its_library_is_not_run(backend):
    outcome = run_row(
        Row("", "wrappers", ("no_such_library",), True, lambda check: None), [backend]
    )
    assert outcome.not_run == "no_such_library is not installed; make matrix installs it"
