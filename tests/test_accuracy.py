"""The error bound holds on adversarial data; `make accuracy` checks a hundred thousand tensors."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from paramstats._core import moments
from tests import oracle
from tests.conftest import load_backend
from tests.dtypes import DTYPES
from tools.accuracy import adversarial, bound, large
from tools.accuracy.bound import assert_within, state_of


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Most tensors here are small; with several threads torch's own operators would be slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@given(adversarial.tensors())
@settings(max_examples=1500)
def test_native_kernels_stay_within_the_bound(tensor):
    backend = load_backend("native")
    exact = oracle.exact(tensor)
    before = backend.native.simd_level()
    try:
        for level in backend.native.simd_levels():
            backend.native.set_simd_level(level)
            assert_within("native", state_of(backend, tensor), exact, tensor.dtype)
    finally:
        backend.native.set_simd_level(before)


@given(adversarial.tensors())
@settings(max_examples=500)
def test_reference_backend_stays_within_the_bound(tensor):
    state = state_of(load_backend("reference"), tensor)
    assert_within("reference", state, oracle.exact(tensor), tensor.dtype)


@pytest.mark.parametrize("step", [4, 16, 64])
@pytest.mark.parametrize("period", [8, 64])
def test_roundings_in_one_direction_stay_within_the_bound(native, simd_level, step, period):
    """A lane adds up 8 squares before it is widened; more would leave the bound here."""
    x = adversarial.rounds_one_way(40_000, step, period, 2, np.random.default_rng(0))
    tensor = torch.from_numpy(x).to(torch.float32)
    assert_within("native", state_of(native, tensor), oracle.exact(tensor), tensor.dtype)


def test_the_published_bound_follows_from_the_kernels_constants(native):
    extension = native.native
    published = bound.bound_of("native", torch.float32)
    a, b = bound.derived(extension.INNER + 2, 3, extension.MAX_SHIFT_SHARE)
    assert published.mean * 0.99 <= a <= published.mean
    # The formula allows 11 roundings of a sum and 13 of a sum of squares. Pivot 0 does not round d.
    additions = extension.INNER - 1 + 2
    at_zero = additions + math.log2(extension.TILES_AT_ZERO)
    assert max(additions + 1, at_zero) <= 11 and max(additions + 3, at_zero + 1) <= 13
    assert published.std * 0.98 <= b <= published.std == published.norm


@pytest.mark.parametrize("statistic", ["mean", "m2"])
def test_a_state_outside_the_bound_is_noticed(statistic):
    tensor = torch.tensor([1.0, 2.0, 4.0])
    exact = oracle.exact(tensor)
    state = state_of(load_backend("reference"), tensor)
    assert bound.errors(state, exact, "native", torch.float32).worst_used < 0.1
    wrong = state._replace(**{statistic: getattr(state, statistic) * (1 + 3e-6)})
    assert bound.errors(wrong, exact, "native", torch.float32).worst_used > 1


@given(adversarial.tensors(chunks=False))
@settings(max_examples=300)
def test_the_oracle_adds_up_exactly(tensor):
    found = oracle.exact(tensor[:400])
    elements = [Fraction(x) for x in tensor[:400].tolist() if math.isfinite(x)]
    assert found.n == len(elements)
    assert found.sum == sum(elements)
    assert found.sum_sq == sum(x * x for x in elements)


@pytest.mark.parametrize("value", [Fraction(2), Fraction(1, 3) ** 200, Fraction(10) ** 600])
def test_the_oracles_square_root(value):
    root = oracle.root(value)
    assert abs(root * root - value) <= value / 2**98


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", large.SHAPES)
def test_a_total_of_a_billion_elements_stays_within_the_bound(shape, dtype):
    """Also a part of it; `python -m tools.accuracy.large` checks tensors of ten million."""
    kinds = {name: load_backend(name) for name in ("native", "reference")}
    found = [
        *large.check_tensor(shape, dtype, 20_000, kinds),
        *large.check_total(shape, dtype, 10**9, 100_000, {"native": kinds["native"]}),
        *large.check_total(shape, dtype, 10**6, 1_000, {"reference": kinds["reference"]}),
    ]
    assert [kind for kind, _ in found] == ["native", "reference"] * 2


def test_a_total_outside_the_bound_is_noticed(native):
    """The mean of the total moves by the 10,000th part of its bound at each state."""

    def wrong_sum(table, begin, end):
        merged = native.merge_rows(table, begin, end)
        state = moments.row(merged, 0)
        state = state._replace(mean=state.mean * (1 + 2e-6))
        return moments.ROW.pack(*state) + merged[moments.ROW.size :]

    kinds = {"native": dataclasses.replace(native, merge_rows=wrong_sum)}
    with pytest.raises(AssertionError, match="mean_used"):
        list(large.check_total("a ramp from zero", torch.float32, 10**9, 10_000, kinds))
