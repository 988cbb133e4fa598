"""The bound holds on adversarial data; `make accuracy` tries a hundred thousand tensors."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from paramstats._core import moments, reference
from paramstats._core.backend import Implementation
from paramstats._core.moments import Moments
from tests.accuracy import adversarial, bound, rational
from tests.conftest import load_backend


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Most tensors here are small, and torch's threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def state_of(chosen: Implementation, tensor: torch.Tensor) -> Moments:
    """A tensor's state by an backend, without what `summarize` does around it."""
    table, left, transfers = chosen.read([tensor], True, False)
    if left:
        table, _, skipped = reference.fill(table, left)
        assert not skipped
    return moments.row(reference.finished(table, transfers), 0)


def assert_within(
    name: str, state: Moments, tensor: torch.Tensor, truth: rational.Exact
) -> bound.Errors:
    """How far the state is off, which is not too far."""
    found = bound.errors(state, truth, name, tensor.dtype)
    assert found.worst_used <= 1, found
    assert state.count == tensor.numel() and moments.finite_count(state) == truth.n
    if tensor.dtype is not torch.uint64:  # torch compares none of them
        assert state.zeros == int((tensor == 0).sum())
    wide = tensor.to(torch.float64)
    wide = wide[wide.isfinite()]
    assert (state.min, state.max) == (wide.min().item(), wide.max().item())
    assert state.m2 == 0 if state.min == state.max else state.m2 > 0
    return found


@given(adversarial.tensors())
@settings(max_examples=1500)
def test_the_native_engine(tensor):
    chosen = load_backend("native")
    truth = rational.exact(tensor)
    before = chosen.native.simd_level()
    try:
        for level in chosen.native.simd_levels():
            chosen.native.set_simd_level(level)
            assert_within("native", state_of(chosen, tensor), tensor, truth)
    finally:
        chosen.native.set_simd_level(before)


@given(adversarial.tensors())
@settings(max_examples=500)
def test_the_reference_engine(tensor):
    state = state_of(load_backend("reference"), tensor)
    assert_within("reference", state, tensor, rational.exact(tensor))


@pytest.mark.parametrize("step", [4, 16, 64])
@pytest.mark.parametrize("period", [8, 64])
def test_roundings_that_all_go_one_way(native, simd_level, step, period):
    """As few as the kernels' lanes add up before they are widened (8): more would be seen."""
    x = adversarial.rounds_one_way(40_000, step, period, 2, np.random.default_rng(0))
    tensor = torch.from_numpy(x).to(torch.float32)
    assert_within("native", state_of(native, tensor), tensor, rational.exact(tensor))


def test_the_published_bound_is_what_the_constants_give(native):
    extension = native.native
    published = bound.bound_of("native", torch.float32)
    a, b = bound.derived(extension.INNER + 2, 3, extension.MAX_SHIFT_SHARE)
    assert published.mean * 0.99 <= a <= published.mean
    assert published.std * 0.98 <= b <= published.std == published.norm


@given(adversarial.tensors(chunks=False))
@settings(max_examples=300)
def test_exact_sums_are_those_of_fractions(tensor):
    """The oracle's own arithmetic, against the plainest there is."""
    found = rational.exact(tensor[:400])
    elements = [Fraction(x) for x in tensor[:400].tolist() if math.isfinite(x)]
    assert found.n == len(elements)
    assert found.sum == sum(elements)
    assert found.sum_sq == sum(x * x for x in elements)
    if tensor.dtype.is_floating_point:
        assert float(found.sum) == math.fsum(map(float, elements))


@pytest.mark.parametrize("value", [Fraction(2), Fraction(1, 3) ** 200, Fraction(10) ** 600])
def test_roots(value):
    root = rational.root(value)
    assert abs(root * root - value) <= value / 2**98


@pytest.mark.parametrize("statistic", ["mean", "m2"])
def test_a_state_outside_the_bound_is_found(statistic):
    tensor = torch.tensor([1.0, 2.0, 4.0])
    truth = rational.exact(tensor)
    state = state_of(load_backend("reference"), tensor)
    assert bound.errors(state, truth, "native", torch.float32).worst_used < 0.1
    off = state._replace(**{statistic: getattr(state, statistic) * (1 + 3e-6)})
    assert bound.errors(off, truth, "native", torch.float32).worst_used > 1
