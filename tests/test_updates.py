"""Tests of the rows of an update: those of the native backend and of `fill` are the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from paramstats._core import updates
from paramstats._core.moments import ROW, Moments
from paramstats._core.updates import DIFFERENCE, FORMULA, LAG, UPDATE, Update
from tests import conftest

ADAMW = {"lr": 1e-3, "decay": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 3.0}
FIELDS = {"param": 0, "grad": 1, "momentum": 2, "variance": 3, "step_row": -1, "old": None}


@pytest.fixture
def read() -> Any:
    return conftest.load_backend("native").read


def tensors(n: int = 50) -> list[torch.Tensor]:
    """A parameter, its gradient and Adam's moments."""
    torch.manual_seed(n)
    return [torch.randn(n), torch.randn(n), torch.randn(n), torch.rand(n)]


def both(read: Any, of: list[torch.Tensor], **fields: Any) -> list[list[Moments]]:
    """The rows of an update by the native backend and by `fill`."""
    update = Update(**{**FIELDS, "method": FORMULA, **ADAMW, **fields})
    table, deferred, *_ = read(of, True, True, updates=(update,))
    assert not deferred
    expected, _, skipped = updates.fill(table, of, [update], [0])
    assert not skipped
    return [[*map(Moments._make, ROW.iter_unpack(t))][2 * len(of) :] for t in (table, expected)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
def test_an_update_that_is_not_finite_changes_its_element(read, dtype, value):
    of = tensors()
    of[0][3] = value
    of[0] = of[0].to(dtype)
    native, reference = both(read, of)
    assert native[UPDATE].zeros == reference[UPDATE].zeros
    assert native[UPDATE].nans == reference[UPDATE].nans


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_negative_second_moment_is_below_eps(read, dtype):
    of = [x.to(dtype) for x in tensors()]
    of[3][7] = -1
    native, reference = both(read, of)
    assert native[LAG].zeros == reference[LAG].zeros == 1
    assert native[LAG].nans == reference[LAG].nans == 0
    assert native[LAG].mean == pytest.approx(reference[LAG].mean, rel=1e-6)


@pytest.mark.parametrize("field", ["momentum", "variance", "step_row"])
def test_the_state_of_an_optimizer_is_no_gradient(read, field):
    of = tensors()
    for row in range(4, 9):  # of gradients that are missing; of nothing
        with pytest.raises(ValueError, match="below 4"):
            both(read, of, **{field: row})


def test_operands_that_the_kernels_cannot_read_are_left_to_python(read):
    of = tensors()
    for old in (torch.empty(50, device="meta"), torch.ones(50).long(), torch.ones(49)):
        update = Update(**{**FIELDS, "method": DIFFERENCE, **ADAMW, "old": old})
        _, deferred, *_ = read(of, True, True, updates=(update,))
        assert [row for row, _ in deferred] == [8]
