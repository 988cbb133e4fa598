"""Tests of the updates of CUDA parameters without a GPU: see test_fake_cuda.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from paramstats._core import backend as backends
from paramstats._core import reference, updates
from paramstats._core.moments import ABSENT, ROW, Moments
from paramstats._core.updates import DIFFERENCE, FORMULA, NONE, Update
from tests import test_fake_cuda
from tests.test_fake_cuda import counts_since

fake, cuda = test_fake_cuda.fake, test_fake_cuda.cuda  # the fixtures

ADAM = {"lr": 1e-3, "decay": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 3.0}


class Case:
    """A parameter with its gradient, Adam's moments and a copy, on the CPU.

    Args:
        shape: of all tensors.
        dtype: of the parameter, its gradient and the copy.
        state: of the moments.
    """

    def __init__(self, *shape: int, dtype: Any = torch.float32, state: Any = torch.float32) -> None:
        torch.manual_seed(math.prod(shape))
        self.old = torch.randn(shape, device="cpu").to(dtype)
        self.w = (self.old + 1e-2 * torch.randn(shape, device="cpu")).to(dtype)
        self.w.grad = torch.randn(shape, device="cpu").to(dtype)
        self.m = torch.randn(shape, device="cpu").to(state)
        self.v = torch.rand(shape, device="cpu").to(state)
        self.step = torch.tensor(3.0, device="cpu")

    def tensors(self) -> list[torch.Tensor]:
        return [self.w, self.m, self.v, self.step]

    def update(self, method: int, first: int = 0, n: int = 4, **changes: Any) -> Update:
        """The update of the tensors that begin at `first` in a list of `n`."""
        old = self.old if method == DIFFERENCE else None
        rows = {"param": first, "grad": n + first, "momentum": first + 1, "variance": first + 2}
        update = Update(**rows, step_row=-1, old=old, method=method, **ADAM)  # type: ignore[arg-type]
        return update._replace(**changes)

    def to(self, cuda: Any, device: int = 0) -> Case:
        """Move all tensors but the step to a fake device."""
        assert self.w.grad is not None
        grad = cuda.to(self.w.grad, device)
        self.w, self.old, self.m, self.v = (
            cuda.to(x, device) for x in (self.w.detach(), self.old, self.m, self.v)
        )
        self.w.grad = grad
        return self


def unpack(table: bytes) -> list[Moments]:
    return [Moments(*row) for row in ROW.iter_unpack(table)]


def rows_of(tensors: list[torch.Tensor], all_updates: list[Update]) -> list[Moments]:
    """Read updates with the native backend, which must read all of them."""
    read = backends.active().read
    table, deferred, transfers, _ = read(tensors, True, True, updates=tuple(all_updates))
    assert not deferred
    found = unpack(reference.finished(table, transfers))
    return found[2 * len(tensors) :]


def truth_of(tensors: list[torch.Tensor], all_updates: list[Update]) -> list[Moments]:
    n = len(tensors)
    empty = bytes(72 * (2 * n + 4 * len(all_updates)))
    table, _, skipped = updates.fill(empty, tensors, all_updates, range(len(all_updates)))
    assert not skipped
    return unpack(table)[2 * n :]


def assert_rows(found: list[Moments], expected: list[Moments]) -> None:
    assert len(found) == len(expected)
    for row, (got, want) in enumerate(zip(found, expected, strict=True)):
        assert got.count == want.count and got.nans == want.nans, row
        if want.count in (ABSENT, 0):
            continue
        assert got.zeros == want.zeros, row
        assert got.mean == pytest.approx(want.mean, rel=1e-5, abs=1e-6 * math.sqrt(want.m2)), row
        if row % 4 == 0:
            assert got.m2 == pytest.approx(want.m2, rel=1e-5)
            assert (got.min, got.max) == pytest.approx((want.min, want.max), rel=1e-5)


@pytest.mark.parametrize("method", [NONE, FORMULA, DIFFERENCE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_those_of_the_cpu(cuda, method, dtype):
    cases = [Case(3, 5, dtype=dtype), Case(5000, dtype=dtype), Case(1, dtype=dtype)]
    n = 4 * len(cases)

    def read(reader: Any) -> list[Moments]:
        tensors = [x for case in cases for x in case.tensors()]
        return reader(tensors, [case.update(method, 4 * i, n) for i, case in enumerate(cases)])

    expected = read(truth_of)
    assert (expected[0].count == ABSENT) == (method == NONE)
    for case in cases:
        case.to(cuda)
    before = cuda.counts()
    assert_rows(read(rows_of), expected)
    counts = counts_since(cuda, before)
    assert (counts["launches"], counts["copies"]) == (3, 1)


def test_the_step_may_be_on_either_device(cuda):
    case = Case(100)
    expected = truth_of(case.tensors(), [case.update(FORMULA)])
    case.to(cuda)
    by_row = [case.update(FORMULA, step_row=3, step=math.nan)]
    assert_rows(rows_of(case.tensors(), by_row), expected)
    case.step = cuda.to(case.step, 0)
    assert_rows(rows_of(case.tensors(), by_row), expected)


def test_absent_and_empty_rows(cuda):
    case = Case(100).to(cuda)
    case.w.grad = None
    change, *products = rows_of(case.tensors(), [case.update(FORMULA)])
    assert change.count == 100 and [row.count for row in products] == [ABSENT] * 3
    empty = Case(0).to(cuda)
    assert rows_of(empty.tensors(), [empty.update(DIFFERENCE)]) == [Moments()] * 4


@pytest.mark.parametrize(
    ("name", "tensor", "device"),
    [
        pytest.param("m", torch.ones(4, 6), None, id="a moment on the CPU"),
        pytest.param("m", torch.ones(4, 6), 1, id="a moment on another device"),
        pytest.param("v", torch.ones(6, 4).T, 0, id="another order of dimensions"),
        pytest.param("v", torch.ones(4, 6).long(), 0, id="integers"),
        pytest.param("v", torch.ones(5), 0, id="another size"),
        pytest.param("v", torch.ones(4, 12)[:, ::2], 0, id="gaps"),
        pytest.param("step", torch.ones(2), 0, id="two steps"),
        pytest.param("step", torch.ones(1), 1, id="a step on another device"),
    ],
)
def test_what_the_kernels_cannot_read_is_left_to_python(cuda, name, tensor, device):
    case, good = Case(4, 6).to(cuda), Case(4, 6).to(cuda)
    setattr(case, name, tensor if device is None else cuda.to(tensor, device))
    tensors = case.tensors() + good.tensors()
    both = (case.update(FORMULA, 0, 8, step_row=3), good.update(FORMULA, 4, 8))
    table, deferred, transfers, _ = backends.active().read(tensors, True, True, updates=both)
    of_updates = [(row, t) for row, t in deferred if row >= 16]
    assert len(of_updates) == 1 and of_updates[0][0] == 16 and of_updates[0][1] is case.w
    found = unpack(reference.finished(table, transfers))[16:]
    assert [row.count for row in found[:4]] == [0] * 4
    assert all(math.isnan(row.mean) for row in found[:4])
    assert [row.count for row in found[4:]] == [24] * 4


def test_tensors_of_other_orders(cuda):
    """All operands are transposed: no copy is needed."""
    case = Case(40, 60)
    grad = case.w.grad
    case.w, case.old, case.m, case.v = (x.T for x in (case.w, case.old, case.m, case.v))
    case.w.grad = grad.T
    expected = truth_of(case.tensors(), [case.update(DIFFERENCE)])
    assert_rows(rows_of(case.to(cuda).tensors(), [case.update(DIFFERENCE)]), expected)


@pytest.mark.parametrize("name", ["old", "m", "v", "step", "grad"])
def test_operands_that_another_thread_replaces_during_the_launch(cuda, name):
    """The memory must not be freed while the kernel will read it: the call reads again."""
    case = Case(5000)
    case.to(cuda)
    case.step = cuda.to(case.step, 0)
    method = DIFFERENCE if name == "old" else FORMULA
    update = case.update(method, step_row=3)
    tensor = case.w.grad if name == "grad" else getattr(case, name)
    new = cuda.to(torch.full(tensor.shape, 2.0, device="cpu"), 0)

    def replace() -> None:
        tensor.data = new
        cuda.run()

    cuda.before_launch(replace)
    before = cuda.counts()
    found = rows_of(case.tensors(), [update])
    assert counts_since(cuda, before)["launches"] == 6  # a launch of each kernel, twice
    assert all(math.isfinite(row.mean) for row in found)
    if name == "old":
        assert found[0].mean == pytest.approx(float(_cpu(case.w).mean()) - 2, rel=1e-5)


def _cpu(tensor: torch.Tensor) -> torch.Tensor:
    import ctypes

    raw = (ctypes.c_float * tensor.numel()).from_address(tensor.data_ptr())
    return torch.tensor(list(raw), device="cpu")


def test_a_copy_may_be_freed_after_the_call(cuda):
    case = Case(5000)
    expected = truth_of(case.tensors(), [case.update(DIFFERENCE)])
    case.to(cuda)
    cuda.use_stream(0, 2)  # the copy was allocated on another stream
    tensors = case.tensors()
    table, _, transfers, _ = backends.active().read(
        tensors, True, True, updates=(case.update(DIFFERENCE),)
    )
    del case.old
    found = unpack(reference.finished(table, transfers))
    assert_rows(found[8:], expected)
