"""Moments in Python: merge, scaling, and agreement with the C++ implementation."""

from __future__ import annotations

import itertools
import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paramstats._core import moments, states
from paramstats._core.moments import (
    ABSENT,
    ROW,
    Moments,
    Statistics,
    finalize,
    merge,
    unread,
    unscaled,
)
from tests.conftest import load_backend

elements = st.lists(
    st.one_of(st.floats(-1e6, 1e6), st.sampled_from([0.0, math.nan, math.inf, -math.inf])),
    max_size=30,
)


def state_of(values: list[float]) -> Moments:
    if not values:
        return Moments()
    return states.from_row(states.exact(torch.tensor(values, dtype=torch.float64)).tolist())


@given(elements, elements)
def test_merging_two_states_gives_the_state_of_all_elements(a, b):
    merged, whole = merge(state_of(a), state_of(b)), state_of(a + b)
    assert merged[:5] == whole[:5] and merged[7:] == whole[7:]
    size = max((abs(v) for v in a + b if math.isfinite(v)), default=0.0)
    assert merged.mean == pytest.approx(whole.mean, rel=1e-12, abs=1e-12 * size)
    assert merged.m2 == pytest.approx(whole.m2, rel=1e-9, abs=1e-12 * size**2)


@given(elements)
def test_merging_an_empty_state_changes_nothing(a):
    state = state_of(a)
    assert merge(state, Moments()) == state == merge(Moments(), state)


def test_states_of_a_constant_merge_without_rounding():
    part = Moments(3, 0, 0, 0, 0, 0.1, 0.0, 0.1, 0.1)
    total = Moments()
    for _ in range(1000):
        total = merge(total, part)
    assert (total.mean, total.m2, total.count) == (0.1, 0.0, 3000)


def test_opposite_means_near_the_limit_do_not_overflow():
    a = Moments(1, 0, 0, 0, 0, 1.7e308, 0.0, 1.7e308, 1.7e308)
    b = Moments(1, 0, 0, 0, 0, -1.7e308, 0.0, -1.7e308, -1.7e308)
    assert merge(a, b).mean == 0.0 and merge(a, b).m2 == math.inf


STATES = [
    Moments(),
    Moments(1, 0, 0, 0, 0, 2.0, 0.0, 2.0, 2.0),
    Moments(5, 2, 0, 0, 0, 0.3, 7.1, -1.0, 3.0),
    Moments(5, 1, 1, 1, 1, 0.3, 7.1, -1.0, 3.0),
    Moments(5, 1, 0, 2, 0, 0.3, 7.1, -1.0, 3.0),
    Moments(5, 1, 0, 0, 2, 0.3, 7.1, -1.0, 3.0),
    Moments(2, 0, 0, 2, 0),
    Moments(2, 0, 0, 0, 2),
    Moments(2, 0, 2, 0, 0),
    unread(7),
    unread(0),
]


@pytest.mark.parametrize("correction", [0, 1, 2, 6])
@pytest.mark.parametrize("grad_scale", [1.0, 0.125, 1024.0])
def test_cpp_and_python_agree_on_every_kind_of_state(correction, grad_scale):
    native = load_backend("native")
    rows = [*STATES, *STATES]
    table = b"".join(ROW.pack(*state) for state in rows)
    total = ROW.pack(*STATES[2]) + ROW.pack(*STATES[3])
    columns = bytes(range(len(Statistics._fields)))
    names = [f"{i}/{f}" for i in range(len(rows) + 2) for f in Statistics._fields]
    arguments = (table, total, dict.fromkeys(names), columns, correction, grad_scale)
    expected, actual = moments.scalars(*arguments), native.scalars(*arguments)
    assert actual[f"{len(rows)}/mean"] == 0.3
    assert list(expected) == list(actual)
    for key, value in expected.items():
        assert actual[key] == pytest.approx(value, rel=1e-15, nan_ok=True), key
        assert type(actual[key]) is type(value) is float
    for index in range(len(rows)):
        arguments = (table, index, correction, grad_scale)
        expected, actual = moments.finalize_row(*arguments), native.finalize_row(*arguments)
        assert actual == pytest.approx(tuple(expected), rel=1e-15, nan_ok=True)
    for end, index in itertools.product(range(len(STATES) + 1), range(2)):
        expected, actual = (
            moments.row(implementation.merge_rows(table, 0, end), index)
            for implementation in (moments, native)
        )
        assert actual[:5] == expected[:5]
        assert actual[5:] == pytest.approx(expected[5:], rel=1e-15, nan_ok=True)


@pytest.mark.parametrize("present", range(4))
def test_merged_gradients_are_absent_only_if_all_are(present):
    state = ROW.pack(*Moments(1, 0, 0, 0, 0, 2.0, 0.0, 2.0, 2.0))
    absent, missing = ROW.pack(*unread(ABSENT)), ROW.pack(*unread(7))
    gradients = ((absent, absent), (absent, state), (missing, absent), (state, missing))[present]
    table = b"".join((state, state, *gradients))
    for backend in (moments, load_backend("native")):
        merged = backend.merge_rows(table, 0, 2)
        assert moments.row(merged, 0).count == 2
        assert moments.is_absent(merged, 1) == (present == 0)
        assert moments.row(merged, 1).count == (ABSENT, 1, 7, 1)[present]
        none = backend.merge_rows(table, 1, 1)
        assert moments.row(none, 0) == Moments() and moments.is_absent(none, 1)


@pytest.mark.parametrize("correction", [0, 1, 2.5, 6, -1e300])
@pytest.mark.parametrize("grad_scale", [1.0, 0.125, 1024.0, 3.0, 1e-300, 1e300])
def test_finalize_table_of_both_backends_is_bitwise_equal(correction, grad_scale):
    """Only norm and rms may differ by one rounding: Python's hypot is not the C library's."""
    rows = [*STATES, unread(ABSENT), Moments(3, 0, 0, 0, 0, -1e-310, 1e308, -4e-310, 1.7e308)]
    table = b"".join(ROW.pack(*state) for state in 2 * rows)
    got = load_backend("native").finalize_table(table, correction, grad_scale)
    want = moments.finalize_table(table, correction, grad_scale)
    unpack = moments.STATISTICS_ROW.iter_unpack
    assert len(got) == len(want) == 2 * len(rows) * moments.STATISTICS_ROW.size
    for row, (a, b) in enumerate(zip(unpack(got), unpack(want), strict=True)):
        for name, x, y in zip(Statistics._fields, a, b, strict=True):
            rounding = math.ulp(y) if name in ("norm", "rms") and math.isfinite(y) else 0.0
            same = struct.pack("d", x) == struct.pack("d", y) or (math.isnan(x) and math.isnan(y))
            assert same or abs(x - y) <= rounding, (row, name, x, y)


def test_absent_rows_have_no_scalars():
    table = ROW.pack(*Moments(1, 0, 0, 0, 0, 2.0, 0.0, 2.0, 2.0)) + ROW.pack(*unread(ABSENT))
    for backend in (moments, load_backend("native")):
        keys = dict.fromkeys("abcd")
        assert backend.scalars(table, table, keys, bytes([1]), 1, 1.0) == {"a": 2.0, "c": 2.0}


def test_scaling_a_state_scales_its_elements():
    values = [1.0, -2.0, 5.0, math.inf, math.nan, 0.0]
    assert unscaled(state_of(values), 4.0) == state_of([v / 4 for v in values])


def test_finalize_gives_statistics_computed_by_hand():
    statistics = finalize(Moments(4, 1, 0, 0, 0, 0.0, 26.0, -4.0, 3.0), correction=1)
    assert statistics.norm == math.sqrt(26) and statistics.var == 26 / 3 and statistics.abs_max == 4
    assert statistics.rms == math.sqrt(6.5) and statistics.zero_fraction == 0.25
