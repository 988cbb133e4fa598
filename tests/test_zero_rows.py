"""Rows of zeros, which are found without asking."""

from __future__ import annotations

import pickle

import pytest
import torch

import paramstats
from paramstats._core import reference_details
from tests.dtypes import DTYPES

summarize = paramstats.summarize


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(9,), (11, 2), (8, 3), (37, 4), (21, 8), (17, 4, 5), (100, 64), (3, 300_000)]
)
def test_every_dtype_and_shape(backend, dtype, shape):
    x = torch.ones(shape).to(dtype)
    expected = tuple(range(0, shape[0], 2))
    for row in expected:
        x[row] = 0
    assert summarize({"x": x})["x"].zero_rows == expected


def test_zeros_that_fill_no_row(backend):
    x = torch.ones(6, 5)
    x[:, 2] = 0
    assert summarize({"x": x})["x"].zero_rows == ()
    x[3] = 0
    x[3, 0] = float("nan")
    assert summarize({"x": x, "e": torch.zeros(0, 3), "s": torch.tensor(0.0)})["x"].zero_rows == ()


def test_views_gradients_and_records(backend):
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight[[0, 5]] = 0
    model(torch.ones(2, 4)).sum().backward()
    model[1].weight.grad[1] = -0.0
    summary = summarize(model)
    for one in (summary, pickle.loads(pickle.dumps(summary)), summary.filter("weight")):
        assert one["0.weight"].zero_rows == (0, 5)
        assert one["1.weight"].grad.zero_rows == (1,)
    view = model[0].weight.detach().t().contiguous().t()
    gaps = torch.zeros(12, 8)[::2, ::2]
    gaps[1] = 1
    other = summarize({"view": view, "gaps": gaps, "complex": torch.zeros(2, 2) * 1j})
    assert other["view"].zero_rows == (0, 5) and other["gaps"].zero_rows == (0, 2, 3, 4, 5)
    assert other["complex"].zero_rows == (0, 1)


def test_too_many_rows(backend, monkeypatch):
    monkeypatch.setattr(reference_details, "MOST_ROWS", 9)
    x = torch.ones((1 << 20) + 1 if backend.name == "native" else 10, dtype=torch.int8)
    assert summarize({"x": x})["x"].zero_rows == ()
    x[5] = 0
    assert summarize({"x": x})["x"].zero_rows is None


def test_several_tensors_together(backend):
    model = torch.nn.Linear(4, 6)
    assert summarize(model).total.zero_rows == ()
    with torch.no_grad():
        model.weight[1] = 0
    assert summarize(model).total.zero_rows is None


def test_tensors_that_are_not_read(backend):
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    assert summarize({"w": weight}, params=False)["w"].zero_rows is None
    assert summarize({"m": torch.zeros(3, 2, device="meta")})["m"].zero_rows is None
    assert summarize({"e": torch.zeros(5, 0)}, rows=True)["e"].zero_rows == ()
