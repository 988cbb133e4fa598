"""Joins what many processes hold of the same tensors, all tensors at once, by torch operators.

A part is a row of ten 64-bit words: its key, then a state as `moments.ROW` lays it out.
"""

from __future__ import annotations

import hashlib
import math
import struct

import torch
from torch import Tensor

from paramstats._core.moments import ABSENT, ROW, unread

WORDS = 1 + ROW.size // 8


def word_for(value: object) -> int:
    """Stands for a value: the same on all processes for what looks the same; never 0."""
    return int(struct.unpack("=q", hashlib.sha256(repr(value).encode()).digest()[:8])[0]) | 1


NOT_HELD = -1
"""The key of a part that a process has nothing of."""

# What was amiss with a row: bits of the word that held the key. Above them the process with the odd
# one, then the process that it differs from.
INCOMPLETE = 1
DIVERGED = 2
UNREADABLE = 4
_BITS = 3
_PROCESS_BITS = 30

_COUNT, _ZEROS, _NANS, _MEAN, _M2, _MIN, _MAX = 0, 1, 2, 5, 6, 7, 8
"""Positions in a state; up to _MEAN they are counts."""


def trouble(word: int) -> tuple[int, int, int]:
    """The bits of a row's first word, and the processes that it names."""
    both = word >> _BITS
    return word & ((1 << _BITS) - 1), both & ((1 << _PROCESS_BITS) - 1), both >> _PROCESS_BITS


def merge_parts(parts: Tensor, numels: Tensor, compare: bool) -> Tensor:
    """One row out of each process's row for the same tensor; `trouble` reads its first word.

    Args:
        parts: [processes, tensors, WORDS], int64.
        numels: [tensors], int64: how many elements all parts of a tensor together must have.
        compare: whether parts with one key must be the same to the last bit.

    Parts are joined in the order of their keys, those with the same key counted once.
    """
    keys = parts[..., 0]
    absent = parts[..., 1 + _COUNT] == ABSENT
    held = keys != NOT_HELD
    # Ordered by key; of one key what was read before what was not, and that before what is absent;
    # what is not all finite before what is, so that no NaN is overlooked; then by process.
    finite = (parts[..., 1 + _NANS : 1 + _MEAN] == 0).all(-1)
    ranked = 8 * keys + 4 * absent + 2 * _is_unread(parts[..., 1:]) + finite
    order = ranked.where(held, torch.iinfo(torch.int64).max)
    processes = torch.arange(len(parts))[:, None].expand_as(keys)
    if not (order[1:] >= order[:-1]).all():
        processes = order.argsort(stable=True, dim=0)
        parts = parts.gather(0, processes[..., None].expand_as(parts))
    keys, states = parts[..., 0], parts[..., 1:]
    held = keys != NOT_HELD
    repeated = torch.zeros_like(held)
    repeated[1:] = held[1:] & (keys[1:] == keys[:-1])
    counted = held & ~repeated & (states[..., _COUNT] != ABSENT)

    not_read = counted & _is_unread(states)
    differs = torch.zeros_like(held)
    if compare:  # with the one before; what was not read is compared with nothing
        absent = states[..., _COUNT] == ABSENT
        differs[1:] = repeated[1:] & (states[1:] != states[:-1]).any(-1)
        differs &= ~_is_unread(states) | absent
    failed = not_read & (states[..., _ZEROS] != 0)
    some_not_read, some_read = not_read.any(0), (counted & ~not_read).any(0)
    unreadable = failed.any(0) | (some_not_read & some_read)

    merged = _merged(states, counted & ~not_read)
    incomplete = some_read & ~some_not_read & (merged[:, _COUNT] != numels)
    incomplete |= ~held.any(0)
    merged = torch.where(some_not_read[:, None], _unread_rows(numels), merged)
    nothing = _unread_rows(torch.full_like(numels, ABSENT))
    merged = torch.where(counted.any(0)[:, None], merged, nothing)

    diverged = differs.any(0) & ~unreadable
    words = INCOMPLETE * incomplete + DIVERGED * diverged + UNREADABLE * unreadable
    if (diverged | unreadable).any():
        odd = torch.where(unreadable, _first(failed | not_read), _first(differs))[None]
        named = processes.gather(0, odd)
        named += processes.gather(0, (odd - 1).clamp(min=0)) << _PROCESS_BITS
        words += (named[0] << _BITS) * (diverged | unreadable)
    return torch.cat([words[:, None], merged], dim=1)


def _is_unread(states: Tensor) -> Tensor:
    return states[..., _MEAN].contiguous().view(torch.float64).isnan()


def _first(condition: Tensor) -> Tensor:
    """Of each column the first row that is so."""
    return condition.to(torch.uint8).argmax(0)


def _unread_rows(counts: Tensor) -> Tensor:
    row = torch.frombuffer(bytearray(ROW.pack(*unread(0))), dtype=torch.int64)
    rows = row.repeat(len(counts), 1)
    rows[:, _COUNT] = counts
    return rows


def _merged(states: Tensor, counted: Tensor) -> Tensor:
    """Chan's merge of the states that count, neighbours first, then neighbours of these."""
    counts = states[..., :_MEAN] * counted[..., None]
    statistics = states[..., _MEAN:].contiguous().view(torch.float64)
    mean, m2 = (statistics[..., i].where(counted, 0.0) for i in (0, 1))
    low = statistics[..., 2].where(counted, math.inf).amin(0)
    high = statistics[..., 3].where(counted, -math.inf).amax(0)
    finite = counts[..., 0] - counts[..., 2:].sum(-1)
    n = finite.to(torch.float64)
    while len(n) > 1:
        if len(n) % 2:
            n, mean, m2 = (torch.cat([x, torch.zeros_like(x[:1])]) for x in (n, mean, m2))
        n, mean, m2 = _chan((n[::2], mean[::2], m2[::2]), (n[1::2], mean[1::2], m2[1::2]))
    doubles = torch.stack([mean[0], m2[0], low, high], dim=1)
    return torch.cat([counts.sum(0), doubles.view(torch.int64)], dim=1)


_Figures = tuple[Tensor, Tensor, Tensor]


def _chan(a: _Figures, b: _Figures) -> _Figures:
    """`moments.merge` of many: (elements, mean, m2)."""
    (na, mean_a, m2_a), (nb, mean_b, m2_b) = a, b
    n = na + nb
    weight = nb / n.clamp(min=1)
    delta = mean_b - mean_a
    mean = mean_a + delta * weight
    m2 = m2_a + m2_b + delta * delta * (na * weight)
    far = delta.isinf()
    mean = torch.where(far, mean_a * (1 - weight) + mean_b * weight, mean)
    m2 = m2.where(~far, math.inf)
    mean = torch.where(na == 0, mean_b, torch.where(nb == 0, mean_a, mean))
    m2 = torch.where(na == 0, m2_b, torch.where(nb == 0, m2_a, m2))
    return n, mean, m2
