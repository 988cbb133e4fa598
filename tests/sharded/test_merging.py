"""Merging the rows of many ranks, compared with merging one state after the other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paramstats._core import states
from paramstats._core.moments import ABSENT, ROW, Moments, merge, unread
from paramstats._sharded.merging import (
    DIVERGED,
    INCOMPLETE,
    NOT_HELD,
    UNREADABLE,
    WORDS,
    decode_status,
    merge_rows,
)
from tests import oracle


def _row(index: int, state: Moments) -> torch.Tensor:
    words = torch.frombuffer(bytearray(ROW.pack(*state)), dtype=torch.int64)
    return torch.cat([torch.tensor([index]), words])


def _merged(
    *rows: tuple[int, Moments], numel: int, compare: bool = True
) -> tuple[int, int, int, Moments]:
    """Merge one row per rank; return status bits, the two ranks of the status, and the state."""
    stacked = torch.stack([_row(*row) for row in rows])[:, None]
    out = merge_rows(stacked, torch.tensor([numel]), compare)
    assert out.shape == (1, WORDS)
    state = Moments._make(ROW.unpack(bytes(out[0, 1:].contiguous().view(torch.uint8).tolist())))
    return *decode_status(int(out[0, 0])), state


def _state(x: torch.Tensor) -> Moments:
    return states.from_row(states.exact(x).tolist()) if x.numel() else Moments()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8, 64])
def test_shards_in_any_order_give_the_state_of_the_whole(ranks):
    torch.manual_seed(ranks)
    x = 1e3 + torch.randn(1000, dtype=torch.float64)
    x[::17] = 0
    rows = [(index, _state(shard)) for index, shard in enumerate(x.tensor_split(ranks))]
    order = torch.randperm(ranks).tolist()
    bits, *_, state = _merged(*(rows[i] for i in order), numel=1000)
    assert bits == 0
    expected = oracle.elements(x)
    assert state.count == 1000 and state.zeros == 59
    assert (state.min, state.max) == (expected.min(), expected.max())
    assert state.mean == pytest.approx(float(expected.mean()), rel=1e-14)
    m2 = float(((expected - expected.mean()) ** 2).sum())
    assert state.m2 == pytest.approx(m2, rel=1e-12)
    assert _merged(*rows, numel=1000)[-1] == state


@given(
    st.lists(
        st.lists(st.floats(allow_subnormal=False, width=32), max_size=4), min_size=1, max_size=9
    )
)
def test_result_is_that_of_merging_one_state_after_the_other(shards):
    states = [_state(torch.tensor(p, dtype=torch.float64)) for p in shards]
    expected = Moments()
    for state in states:
        expected = merge(expected, state)
    bits, *_, got = _merged(*enumerate(states), numel=expected.count)
    assert bits == 0
    assert got[:5] == expected[:5]
    assert (got.min, got.max) == (expected.min, expected.max)
    scale = max((abs(x) for p in shards for x in p if math.isfinite(x)), default=0.0)
    assert got.mean == pytest.approx(expected.mean, rel=1e-12, abs=1e-14 * scale)
    assert got.m2 == pytest.approx(expected.m2, rel=1e-12, abs=1e-14 * scale * scale)


A, B = _state(torch.arange(4.0)), _state(torch.arange(4.0, 8.0))
AB = _state(torch.arange(8.0))
CLOSE_TO_A = A._replace(mean=math.nextafter(A.mean, 2))
WITH_NAN = _state(torch.tensor([0.0, 1, 2, math.nan]))
NONE, UNREAD = unread(ABSENT), unread(4)
FAILED = UNREAD._replace(zeros=1)
NOT_HERE = (NOT_HELD, Moments())

# What each rank sends, the number of elements, then status bits, ranks of the status and state.
CASES = {
    "replicas count once": ([(0, A), (1, B), (0, A), (1, B)], 8, 0, (0, 0), AB),
    "replicas that differ": ([(0, A), (0, A), (0, CLOSE_TO_A)], 4, DIVERGED, (2, 1), A),
    "replica with a NaN is used": ([(0, A), (0, WITH_NAN)], 4, DIVERGED, (0, 1), WITH_NAN),
    "None differs from a tensor": ([(0, NONE), (0, A), NOT_HERE], 4, DIVERGED, (0, 1), A),
    "None everywhere": ([(0, NONE), (1, NONE), NOT_HERE], 4, 0, (0, 0), NONE),
    "shard that is None": ([(0, A), (1, NONE)], 8, INCOMPLETE, (0, 0), A),
    "missing shard": ([(0, A), NOT_HERE], 8, INCOMPLETE, (0, 0), A),
    "held by no rank": ([NOT_HERE, NOT_HERE], 4, INCOMPLETE, (0, 0), NONE),
    "unread shard": ([NOT_HERE, (1, UNREAD), (0, A)], 8, UNREADABLE, (1, 2), unread(8)),
    "unreadable replica": ([(0, FAILED), (0, A)], 4, 0, (0, 0), A),
    "unreadable replicas": ([(0, FAILED), (0, FAILED)], 4, UNREADABLE, (0, 0), UNREAD),
    "unreadable or None": ([(0, FAILED), (0, NONE)], 4, UNREADABLE, (0, 0), UNREAD),
    "read by no rank": ([(0, UNREAD), (1, UNREAD)], 8, 0, (0, 0), unread(8)),
    "empty tensor": ([(0, Moments()), (1, Moments())], 0, 0, (0, 0), Moments()),
    "empty shards": ([(3, Moments()), (1, A), (2, Moments())], 4, 0, (0, 0), A),
}


@pytest.mark.parametrize("case", CASES)
def test_status_and_state(case):
    rows, numel, bits, ranks, state = CASES[case]
    got_bits, *got_ranks, got = _merged(*rows, numel=numel)
    assert (got_bits, *got_ranks) == (bits, *ranks)
    assert repr(got) == repr(state)  # NaN is not equal to itself


def test_replicas_are_not_compared_across_backends():
    assert _merged((0, A), (0, CLOSE_TO_A), numel=4, compare=False)[0] == 0


def test_means_near_the_limit_of_float64():
    far = [Moments(2, 0, 0, 0, 0, m, 0.0, m, m) for m in (1.7e308, -1.7e308)]
    state = _merged((0, far[0]), (1, far[1]), numel=4)[-1]
    assert state == merge(*far) and math.isinf(state.m2)
