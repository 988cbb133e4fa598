"""Small tensors that the reference backend reads together."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import paramstats
from paramstats._core import moments, packing, reference
from paramstats._core.moments import Moments
from paramstats._core.states import from_row
from tests import oracle
from tests.conftest import load_backend
from tests.dtypes import DTYPES, FLOATS
from tools.accuracy.bound import assert_within, state_of

OPERATORS = 100
"""The most operators for 1,000 small tensors."""

SIZES = (1, 2, 3, 63, 64, 65, 768, packing.MAX_NUMEL - 1, packing.MAX_NUMEL, packing.MAX_NUMEL + 1)


def finite(dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors whose squares and sums stay in the range of float64."""
    torch.manual_seed(0)
    out = [(20 * torch.randn(n)).to(dtype) for n in SIZES]
    out += [(100 * (torch.rand(n) < 0.1)).to(dtype) for n in SIZES]
    out += [torch.full((n,), 3.3).to(dtype) for n in SIZES] + [torch.zeros(7).to(dtype)]
    if dtype in (torch.float32, torch.float64):
        out += [(1 + 1e-4 * torch.randn(768)).to(dtype), (1e6 + torch.randn(500)).to(dtype)]
        out += [torch.full((100,), 1.0, dtype=dtype), 1e-30 * torch.randn(50, dtype=dtype)]
        out[-2][50] += torch.finfo(dtype).eps  # the smallest spread
        out += [2.0**-149 * torch.randint(-5, 6, (99,)).to(dtype)]
    return out


def unusual(dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors with NaN and infinities, and finite ones that overflow and underflow float64."""
    out = [torch.full((n,), value) for n in (1, 70) for value in (math.nan, math.inf, -math.inf)]
    for values in ([math.nan], [math.inf, 0.0], [math.nan, math.inf, -math.inf]):
        x = torch.randn(300)
        x[7 : 7 + len(values)] = torch.tensor(values)
        out.append(x)
    out = [x.to(dtype) for x in out]
    if dtype is torch.float64:
        largest = torch.finfo(dtype).max
        out += [scale * torch.randn(200, dtype=dtype) for scale in (1e200, 1e-200, 1e-320)]
        out += [torch.tensor([largest] * 5 + [last], dtype=dtype) for last in (largest, -largest)]
    return out


def states_together(tensors: list[torch.Tensor], grads: bool = False) -> list[Moments]:
    """The states of tensors that the reference backend reads in one call."""
    table, rows, *_ = reference.read(tensors, True, grads)
    table, transfers, skipped, _ = reference.fill(table, rows)
    assert not transfers and not skipped
    return [moments.row(table, row) for row in range(len(tensors))]


def states_on_device(tensors: list[torch.Tensor]) -> list[Moments]:
    """The states that the operators for accelerators compute, here on the CPU."""
    group = packing.Group(is_cpu=False)
    group.rows, group.tensors = list(range(len(tensors))), tensors
    rows, states = zip(
        *((rows, packing.states_on_device(piece)) for rows, piece in group.take()), strict=True
    )
    assert not group.rows
    pending = reference.Pending(
        torch.device("cpu"), [(row, 0) for several in rows for row in several], list(states)
    )
    table = bytearray(moments.ROW.size * len(tensors))
    pending.write(table)
    return [moments.row(bytes(table), row) for row in range(len(tensors))]


@pytest.mark.parametrize("read", [states_together, states_on_device])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_states_stay_within_the_bound(read, dtype):
    tensors = finite(dtype) + (unusual(dtype) if dtype in FLOATS else [])
    random.Random(0).shuffle(tensors)
    for x, state in zip(tensors, read(tensors), strict=True):
        exact = oracle.exact(x)
        counts = (x.numel(), exact.zero_count, exact.nan_count, exact.pos_inf_count)
        assert state[:4] == counts
        if exact.n:
            assert (state.min, state.max) == (exact.min, exact.max)
        if exact.n and exact.min == exact.max:
            assert (state.mean, state.m2) == (exact.min, 0.0)
        elif exact.n and 1e-140 < max(abs(exact.min), abs(exact.max)) < 1e140:
            is_packed = read is states_on_device or x.numel() <= packing.MAX_NUMEL
            assert_within("reference", state, exact, torch.float64 if is_packed else dtype)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_state_does_not_depend_on_other_tensors_or_threads(threads):
    tensors = finite(torch.float32) + unusual(torch.float32) + finite(torch.float64)
    alone = [state_of(load_backend("reference"), x) for x in tensors]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = [states_together(tensors) for _ in range(3)]
        reverse = states_together(tensors[::-1])[::-1]
    finally:
        torch.set_num_threads(before)
    assert all(repr(found) == repr(alone) for found in (*together, reverse))


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators.append(str(function))
        return function(*args, **(kwargs or {}))


def thousand(largest: int) -> list[torch.Tensor]:
    generator = random.Random(0)
    return [torch.randn(generator.randint(1, largest)) for _ in range(1000)]


@pytest.mark.parametrize("read", [packing.states_on_cpu, packing.states_on_device])
def test_the_number_of_operators_does_not_depend_on_the_number_of_tensors(read):
    counts = []
    for tensors in (thousand(30)[:2], thousand(30)):
        with _Count() as count:
            read(tensors)
        counts.append(len(count.operators))
    assert counts[0] == counts[1] <= OPERATORS, count.operators


@pytest.mark.parametrize("shape", [(16,), (4, 4)])
def test_a_summary_of_a_thousand_small_tensors_needs_few_operators(monkeypatch, shape):
    """In addition to one view of each tensor, which is not flat."""
    monkeypatch.setattr(paramstats._core.backend, "_active", load_backend("reference"))
    tensors = {str(i): torch.randn(shape) for i in range(1000)}
    tensors["3"][0] = math.nan  # it is read again
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        paramstats.summarize(tensors)
    called = [event.name for event in profile.events() if event.cpu_parent is None]
    views = called.count("aten::view")
    assert called.count("aten::segment_reduce") == 3
    assert len(called) - views <= OPERATORS
    assert views < (1000 if len(shape) > 1 else 0) + 20


def test_no_value_is_read_on_the_host_of_an_accelerator():
    """On the meta device there are no values: an operator that needs one would raise."""
    states = packing.states_on_device([torch.empty(n, device="meta") for n in (3, 1, 40)])
    assert states.shape == (3, 9) and states.is_meta


def test_pieces_are_bounded(monkeypatch):
    sizes: list[int] = []

    def read(tensors):
        sizes.append(sum(x.numel() for x in tensors))
        return packing.states_on_cpu(tensors)

    monkeypatch.setattr(reference, "states_on_cpu", read)
    tensors = [torch.full((1 + i % packing.MAX_NUMEL,), float(i)) for i in range(300)]
    found = states_together(tensors)
    assert [state.mean for state in found] == list(range(300))
    assert len(sizes) > 1 and max(sizes) < 1 << 15 < min(sizes[:-1]) + packing.MAX_NUMEL

    group = packing.Group(is_cpu=False)
    group.rows, group.tensors = [*range(300)], [torch.empty(1 + 200 * i) for i in range(300)]
    pieces = [[x.numel() for x in piece] for _, piece in group.take()]
    assert sum(map(len, pieces)) == 300 and len(pieces) > 1
    for piece in pieces:
        assert len(piece) * max(piece) <= max(1 << 19, max(piece))


@pytest.mark.parametrize("fails", ["together", "alone"])
def test_tensors_are_read_one_by_one_if_reading_them_together_raises(monkeypatch, fails):
    def fail(tensors):
        raise RuntimeError("out of memory")

    on_cpu = reference.on_cpu

    def fail_for_one(x):
        if x[0] == 2.0:
            raise RuntimeError("broken tensor")
        return on_cpu(x)

    monkeypatch.setattr(reference, "states_on_cpu", fail)
    if fails == "alone":
        monkeypatch.setattr(reference, "on_cpu", fail_for_one)
    tensors = [torch.full((5,), float(i)) for i in range(4)]
    table, rows, *_ = reference.read(tensors, True, False)
    table, _, skipped, _ = reference.fill(table, rows)
    means = [moments.row(table, row).mean for row in range(4)]
    if fails == "alone":
        assert skipped == {2: "RuntimeError: broken tensor"}
        assert math.isnan(means[2]) and means[:2] + means[3:] == [0.0, 1.0, 3.0]
    else:
        assert not skipped and means == [0.0, 1.0, 2.0, 3.0]


def test_a_small_tensor_with_zeros_that_are_not_stored():
    dense = torch.tensor([0.0, 3.0, 0.0, 4.0])
    tensors = [torch.ones(3), dense.to_sparse(), torch.zeros(2).to_sparse(), torch.full((2,), 5.0)]
    found = states_together(tensors)
    assert [state[:2] for state in found] == [(3, 0), (4, 2), (2, 2), (2, 0)]
    assert [state.mean for state in found] == [1.0, 1.75, 0.0, 5.0]
    assert found[1] == from_row(reference.exact(dense).tolist())


def test_gradients_and_dtypes_are_read_into_their_rows():
    tensors = [
        torch.nn.Parameter(torch.full((i + 1,), float(i), dtype=dtype))
        for i, dtype in enumerate([torch.float32, torch.float64, torch.bfloat16] * 3)
    ]
    for x in tensors[::2]:
        x.grad = -x.detach()
    table, rows, *_ = reference.read(tensors, False, True)
    table, *_ = reference.fill(table, rows, False)
    n = len(tensors)
    for i in range(n):
        state, grad = moments.row(table, i), moments.row(table, n + i)
        assert (state.count, moments.is_unread(state)) == (i + 1, True)
        assert grad[:1] + grad[5:6] == ((i + 1, -i) if i % 2 == 0 else (-1, grad.mean))


def test_dual_tensors_are_read_with_the_others(backend):
    x, y, large = torch.randn(100), torch.randn(100), torch.randn(9000)
    expected = paramstats.summarize({"x": x, "y": y, "large": large})
    with torch.autograd.forward_ad.dual_level():
        dual, dual_large = (
            torch.autograd.forward_ad.make_dual(t, torch.ones_like(t)) for t in (x, large)
        )
        found = paramstats.summarize({"x": dual, "y": y, "large": dual_large})
    assert not found.skipped
    assert all(found[name].state() == expected[name].state() for name in expected)


def test_squares_of_large_means_do_not_overflow(backend):
    torch.manual_seed(0)
    for n in (100, 5000):
        x = 1e156 * (1 + 1e-6 * torch.randn(n, dtype=torch.float64))
        summary = paramstats.summarize({"x": x})
        assert not summary.skipped
        assert summary["x"].mean == pytest.approx(1e156, rel=1e-6)
