"""Merge the states that several ranks hold of the same tensors, with torch operators.

The state of a shard is a row of WORDS int64 words: the shard's index, then a state as packed by
`moments.ROW`. In a merged row, the first word is a status instead; `decode_status` reads it.
"""

from __future__ import annotations

import hashlib
import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from paramstats._core.moments import ABSENT, ROW, State, unread

WORDS = 1 + ROW.size // 8
"""Words of a row."""

NOT_HELD = -1
"""The shard index in the row of a rank that holds no part of the tensor."""

# Bits of a status.
INCOMPLETE = 1  # the shards together do not have all elements of the tensor
DIVERGED = 2  # two replicas of one shard have different states
UNREADABLE = 4  # a rank could not read its shard
_STATUS_BITS = 3
_RANK_BITS = 30

_COUNT, _ZEROS, _NANS, _MEAN, _M2, _MIN, _MAX = 0, 1, 2, 5, 6, 7, 8
"""Positions in a state. Those before _MEAN are counts."""


class Status(NamedTuple):
    """What is wrong with a merged row; `rank` has the shard that differs from that of `other`."""

    bits: int
    rank: int
    other: int


def decode_status(word: int) -> Status:
    """Return the status in the first word of a merged row."""
    ranks = word >> _STATUS_BITS
    bits = word & ((1 << _STATUS_BITS) - 1)
    return Status(bits, ranks & ((1 << _RANK_BITS) - 1), ranks >> _RANK_BITS)


def hash_word(value: object) -> int:
    """Return an odd 64-bit hash of `repr(value)`, equal on all ranks and never 0."""
    return int(struct.unpack("=q", hashlib.sha256(repr(value).encode()).digest()[:8])[0]) | 1


def packed_words(state: State) -> Tensor:
    """Return a state as int64 words."""
    return torch.frombuffer(bytearray(ROW.pack(*state)), dtype=torch.int64)


def merge_rows(rows: Tensor, numels: Tensor, compare: bool) -> Tensor:
    """Merge the rows of all ranks into one row per tensor.

    Args:
        rows: [ranks, tensors, WORDS], int64.
        numels: [tensors], int64: the number of elements that all shards of a tensor must have.
        compare: whether replicas of a shard must have the same state, to the last bit.

    Returns:
        [tensors, WORDS], int64. Shards are merged in the order of their indexes. Of several
        replicas of a shard, one counts: preferably one that was read and that has NaN or Inf.
    """
    indexes = rows[..., 0]
    absent = rows[..., 1 + _COUNT] == ABSENT
    held = indexes != NOT_HELD
    # Sort by shard index. Among replicas, rows that were read come first, then unread ones, then
    # absent ones; rows with NaN or Inf come before finite ones, so that they are not overlooked.
    finite = (rows[..., 1 + _NANS : 1 + _MEAN] == 0).all(-1)
    priority = 8 * indexes + 4 * absent + 2 * _is_unread(rows[..., 1:]) + finite
    priority = priority.where(held, torch.iinfo(torch.int64).max)
    ranks = torch.arange(len(rows), dtype=torch.int64, device="cpu")[:, None].expand_as(indexes)
    if not (priority[1:] >= priority[:-1]).all():
        ranks = priority.argsort(stable=True, dim=0)
        rows = rows.gather(0, ranks[..., None].expand_as(rows))
    indexes, states = rows[..., 0], rows[..., 1:]
    held = indexes != NOT_HELD
    replica = torch.zeros_like(held)
    replica[1:] = held[1:] & (indexes[1:] == indexes[:-1])
    counted = held & ~replica & (states[..., _COUNT] != ABSENT)

    unread_rows = counted & _is_unread(states)
    differs = torch.zeros_like(held)
    if compare:  # with the row before; unread rows have no statistics to compare
        absent = states[..., _COUNT] == ABSENT
        differs[1:] = replica[1:] & (states[1:] != states[:-1]).any(-1)
        differs &= ~_is_unread(states) | absent
    failed = unread_rows & (states[..., _ZEROS] != 0)
    some_unread, some_read = unread_rows.any(0), (counted & ~unread_rows).any(0)
    unreadable = failed.any(0) | (some_unread & some_read)

    merged = _merge_states(states, counted & ~unread_rows)
    incomplete = some_read & ~some_unread & (merged[:, _COUNT] != numels)
    incomplete |= ~held.any(0)
    merged = torch.where(some_unread[:, None], _unread_states(numels), merged)
    absent_states = _unread_states(torch.full_like(numels, ABSENT))
    merged = torch.where(counted.any(0)[:, None], merged, absent_states)

    diverged = differs.any(0) & ~unreadable
    status = INCOMPLETE * incomplete + DIVERGED * diverged + UNREADABLE * unreadable
    if (diverged | unreadable).any():
        position = torch.where(unreadable, _first(failed | unread_rows), _first(differs))[None]
        named = ranks.gather(0, position)
        named += ranks.gather(0, (position - 1).clamp(min=0)) << _RANK_BITS
        status += (named[0] << _STATUS_BITS) * (diverged | unreadable)
    return torch.cat([status[:, None], merged], dim=1)


def _is_unread(states: Tensor) -> Tensor:
    return states[..., _MEAN].contiguous().view(torch.float64).isnan()


def _first(condition: Tensor) -> Tensor:
    """Return the first row in each column where the condition holds."""
    return condition.to(torch.uint8).argmax(0)


def _unread_states(counts: Tensor) -> Tensor:
    states = packed_words(unread(0)).repeat(len(counts), 1)
    states[:, _COUNT] = counts
    return states


def _merge_states(states: Tensor, counted: Tensor) -> Tensor:
    """Merge the counted states of each tensor pairwise, in a binary tree."""
    counts = states[..., :_MEAN] * counted[..., None]
    values = states[..., _MEAN:].contiguous().view(torch.float64)
    mean, m2 = (values[..., i].where(counted, 0.0) for i in (0, 1))
    low = values[..., 2].where(counted, math.inf).amin(0)
    high = values[..., 3].where(counted, -math.inf).amax(0)
    finite = counts[..., 0] - counts[..., 2:].sum(-1)
    n = finite.to(torch.float64)
    while len(n) > 1:
        if len(n) % 2:
            n, mean, m2 = (torch.cat([x, torch.zeros_like(x[:1])]) for x in (n, mean, m2))
        n, mean, m2 = _chan((n[::2], mean[::2], m2[::2]), (n[1::2], mean[1::2], m2[1::2]))
    doubles = torch.stack([mean[0], m2[0], low, high], dim=1)
    return torch.cat([counts.sum(0), doubles.view(torch.int64)], dim=1)


_States = tuple[Tensor, Tensor, Tensor]  # finite elements, mean and m2 of many states


def _chan(a: _States, b: _States) -> _States:
    """Merge many pairs of states, with the same formulae as `moments.merge`."""
    (na, mean_a, m2_a), (nb, mean_b, m2_b) = a, b
    n = na + nb
    weight = nb / n.clamp(min=1)
    delta = mean_b - mean_a
    mean = mean_a + delta * weight
    m2 = m2_a + m2_b + delta * delta * (na * weight)
    overflow = delta.isinf()  # opposite means near the limit of float64
    mean = torch.where(overflow, mean_a * (1 - weight) + mean_b * weight, mean)
    m2 = m2.where(~overflow, math.inf)
    mean = torch.where(na == 0, mean_b, torch.where(nb == 0, mean_a, mean))
    m2 = torch.where(na == 0, m2_b, torch.where(nb == 0, m2_a, m2))
    return n, mean, m2
