"""Joining the rows of many processes: against one state after the other, by the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paramstats._core.moments import ABSENT, ROW, Moments, merge, unread
from paramstats._sharded.merging import (
    DIVERGED,
    INCOMPLETE,
    NOT_HELD,
    UNREADABLE,
    WORDS,
    merge_parts,
    trouble,
)
from tests import oracle


def part(key: int, state: Moments) -> torch.Tensor:
    words = torch.frombuffer(bytearray(ROW.pack(*state)), dtype=torch.int64)
    return torch.cat([torch.tensor([key]), words])


def joined(*parts: torch.Tensor, numel: int, compare: bool = True) -> tuple[int, int, Moments]:
    """Of one tensor: bits, the odd process, state."""
    out = merge_parts(torch.stack(parts)[:, None], torch.tensor([numel]), compare)
    assert out.shape == (1, WORDS)
    state = Moments._make(ROW.unpack(bytes(out[0, 1:].contiguous().view(torch.uint8).tolist())))
    bits, odd, _ = trouble(int(out[0, 0]))
    return bits, odd, state


def state_of(x: torch.Tensor) -> Moments:
    from paramstats._core import reference

    return reference._from_row(reference.exact(x).tolist()) if x.numel() else Moments()


NOTHING = part(NOT_HELD, Moments())


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 8, 64])
def test_parts_make_the_whole(processes):
    torch.manual_seed(processes)
    x = 1e3 + torch.randn(1000, dtype=torch.float64)
    x[::17] = 0
    parts = [part(i, state_of(piece)) for i, piece in enumerate(x.tensor_split(processes))]
    order = torch.randperm(processes).tolist()
    bits, _, state = joined(*(parts[i] for i in order), numel=1000)
    assert bits == 0
    expected = oracle.elements(x)
    assert state.count == 1000 and state.zeros == 59
    assert (state.min, state.max) == (expected.min(), expected.max())
    assert state.mean == pytest.approx(float(expected.mean()), rel=1e-14)
    m2 = float(((expected - expected.mean()) ** 2).sum())
    assert state.m2 == pytest.approx(m2, rel=1e-12)
    assert joined(*parts, numel=1000)[2] == state  # in whatever order the processes come


@given(
    st.lists(
        st.lists(st.floats(allow_subnormal=False, width=32), max_size=4), min_size=1, max_size=9
    )
)
def test_as_one_after_the_other(pieces):
    states = [state_of(torch.tensor(p, dtype=torch.float64)) for p in pieces]
    expected = Moments()
    for state in states:
        expected = merge(expected, state)
    bits, _, got = joined(*(part(i, s) for i, s in enumerate(states)), numel=expected.count)
    assert bits == 0
    assert got[:5] == expected[:5]
    assert (got.min, got.max) == (expected.min, expected.max)
    scale = max((abs(x) for p in pieces for x in p if math.isfinite(x)), default=0.0)
    assert got.mean == pytest.approx(expected.mean, rel=1e-12, abs=1e-14 * scale)
    assert got.m2 == pytest.approx(expected.m2, rel=1e-12, abs=1e-14 * scale * scale)


def test_copies_count_once():
    a, b = (state_of(torch.arange(4.0) + i) for i in (0, 4))
    bits, _, state = joined(part(0, a), part(1, b), part(0, a), part(1, b), numel=8)
    assert bits == 0 and state.count == 8 and state.mean == 3.5


def test_copies_that_differ_are_told():
    a = state_of(torch.arange(4.0))
    other = a._replace(mean=math.nextafter(a.mean, 2))
    bits, process, state = joined(part(0, a), part(0, a), part(0, other), numel=4)
    assert (bits, process, state) == (DIVERGED, 2, a)
    assert joined(part(0, a), part(0, other), numel=4, compare=False)[0] == 0


def test_a_copy_that_is_none_stands_behind_one_that_is_there():
    a = state_of(torch.arange(4.0))
    bits, process, state = joined(part(0, unread(ABSENT)), part(0, a), NOTHING, numel=4)
    assert (bits, process, state) == (DIVERGED, 0, a)


def test_a_copy_with_a_nan_is_the_one_that_shows():
    a, b = state_of(torch.arange(4.0)), state_of(torch.tensor([0.0, 1, 2, math.nan]))
    out = merge_parts(torch.stack([part(0, a), part(0, b)])[:, None], torch.tensor([4]), True)
    assert trouble(int(out[0, 0])) == (DIVERGED, 0, 1)
    assert joined(part(0, a), part(0, b), numel=4)[2] == b


def test_none_everywhere_is_none():
    bits, _, state = joined(part(0, unread(ABSENT)), part(1, unread(ABSENT)), NOTHING, numel=4)
    assert bits == 0 and state.count == ABSENT


def test_elements_that_are_missing():
    a = state_of(torch.arange(4.0))
    bits, _, state = joined(part(0, a), part(1, unread(ABSENT)), numel=8)
    assert bits == INCOMPLETE and state.count == 4
    assert joined(part(0, a), NOTHING, numel=8)[0] == INCOMPLETE


def test_a_part_that_could_not_be_read():
    a = state_of(torch.arange(4.0))
    bits, process, state = joined(NOTHING, part(1, unread(4)), part(0, a), numel=8)
    assert (bits, process) == (UNREADABLE, 1)
    assert state.count == 8 and math.isnan(state.mean)


def test_a_copy_that_could_not_be_read_stands_behind_one_that_was():
    a, failed = state_of(torch.arange(4.0)), unread(4)._replace(zeros=1)
    bits, _, state = joined(part(0, failed), part(0, a), numel=4)
    assert bits == 0 and state == a
    assert joined(part(0, failed), part(0, failed), numel=4)[0] == UNREADABLE
    assert joined(part(0, failed), part(0, unread(ABSENT)), numel=4)[0] == UNREADABLE


def test_what_nobody_holds():
    assert joined(NOTHING, NOTHING, numel=4)[0] == INCOMPLETE


def test_what_nobody_reads_has_its_size():
    bits, _, state = joined(part(0, unread(4)), part(1, unread(4)), numel=8)
    assert bits == 0 and state.count == 8 and math.isnan(state.mean)


def test_empty_tensors_and_empty_parts():
    assert joined(part(0, Moments()), part(1, Moments()), numel=0)[2] == Moments()
    a = state_of(torch.arange(4.0))
    assert joined(part(3, Moments()), part(1, a), part(2, Moments()), numel=4)[2] == a


def test_means_at_the_limit():
    far = [Moments(2, 0, 0, 0, 0, m, 0.0, m, m) for m in (1.7e308, -1.7e308)]
    _, _, state = joined(part(0, far[0]), part(1, far[1]), numel=4)
    assert state == merge(*far) and math.isinf(state.m2)
