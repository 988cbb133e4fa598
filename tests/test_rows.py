"""Statistics of rows against float64 arithmetic, and rows that are dead or equal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import paramstats
from tests.dtypes import DTYPES

summarize = paramstats.summarize


def read(x: torch.Tensor, **kwargs) -> paramstats.TensorStats:
    return summarize({"x": x}, rows=True, **kwargs)["x"]


def check(x: torch.Tensor, correction: float = 1.0) -> None:
    rows = read(x, correction=correction).rows
    values = x.to(torch.float64).reshape(x.shape[0], -1).numpy()
    n = values.shape[1]
    assert len(rows) == x.shape[0] and rows.row_count == n
    finite = np.isfinite(values)
    arrays = {stat: getattr(rows, stat) for stat in ("mean", "std", "norm", "abs_max")}
    assert all(len(array) == len(rows) for array in arrays.values())
    assert rows.nonfinite_count.tolist() == (~finite).sum(1).tolist()
    assert rows.zero_count.tolist() == (values == 0).sum(1).tolist()
    for row, ok in enumerate(finite.all(1)):
        if not ok:
            assert all(math.isnan(array[row]) for array in arrays.values())
            continue
        own = values[row]
        rms = math.sqrt((own * own).mean())
        assert abs(arrays["mean"][row] - own.mean()) <= 1e-6 * rms
        assert abs(arrays["norm"][row] - np.linalg.norm(own)) <= 1e-6 * rms * math.sqrt(n)
        assert arrays["abs_max"][row] == np.abs(own).max()
        if n > correction:
            std = math.sqrt(((own - own.mean()) ** 2).sum() / (n - correction))
            assert abs(arrays["std"][row] - std) <= 1e-6 * rms


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(backend, dtype):
    torch.manual_seed(0)
    x = torch.randn(17, 33) * 3 if dtype.is_floating_point else torch.randint(0, 100, (17, 33))
    check(x.to(dtype))


@pytest.mark.parametrize(
    "shape", [(1,), (5,), (3, 1), (1, 9), (4, 3, 2, 5), (3, 300_001), (70_000, 5), (600, 1000)]
)
def test_every_shape(backend, shape):
    torch.manual_seed(0)
    check(torch.randn(shape) + 10, correction=0)


def test_hard_rows(backend):
    torch.manual_seed(0)
    x = torch.randn(6, 1000)
    x[1] += 1e4
    x[2] = 0.1
    x[3, 5] = math.nan
    x[4, 7:9] = torch.tensor([math.inf, -math.inf])
    x[5] = 0
    check(x)
    check(x.t())
    check(x.double() * 1e120)
    assert read(x).rows.std[2] == 0


def test_tensors_without_elements(backend):
    for shape in ((0,), (0, 3), (4, 0)):
        assert read(torch.zeros(shape)).rows is None
    assert read(torch.tensor(1.0)).rows is None
    assert summarize({"x": torch.ones(2)})["x"].rows is None


def test_dead_and_equal_rows(backend):
    torch.manual_seed(0)
    for n in (3, 64, 1000, 300_000):
        x = torch.randn(12, n)
        x[[2, 5]] = 0
        x[5] = -0.0
        x[7] = x[11] = x[0]
        x[8] = x[1].flip(0)
        x[4, -1], x[9] = math.nan, x[4]
        x[9, -1] = math.nan
        rows = read(x).rows
        assert rows.dead == (2, 5) and rows.equal == ((0, 7, 11), (4, 9))
        assert read(x.t().contiguous().t()).rows.equal == rows.equal


def test_dead_units_and_experts_are_found_by_index(backend):
    torch.manual_seed(0)
    units = torch.nn.Linear(16, 64)
    dead = sorted(torch.randperm(64)[:40].tolist())
    experts = torch.nn.Parameter(torch.randn(8, 16, 4))
    with torch.no_grad():
        units.weight[dead] = 0
        experts[[1, 6]] = 0
    units.weight.grad, experts.grad = torch.randn(64, 16), torch.randn(8, 16, 4)
    units.weight.grad[dead] = 0
    experts.grad[[1, 6]] = 0
    summary = summarize({"units": units.weight, "experts": experts}, rows=True)
    for stats, expected in ((summary["units"], dead), (summary["experts"], [1, 6])):
        for one in (stats, stats.grad):
            assert list(one.rows.dead) == list(one.zero_rows) == expected
    assert summary.total.rows is None and summary.total.zero_rows is None
