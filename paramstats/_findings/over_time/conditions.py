"""Decide when a condition begins and ends: it must last, and a short gap does not end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """How long a condition must last.

    Args:
        entries: it begins at this number of entries in a row for which it was true,
        steps: if the first of these was at least this many steps ago.
        gap: it ends at this number of entries in a row for which it was not true.
    """

    entries: int
    steps: int
    gap: int


RUN, SINCE, OFF, ACTIVE = range(4)
"""Columns of the state: entries in a row for which the condition was true, the step of the first of
them, entries in a row for which it was not true, and whether the condition has begun."""


def advance(
    state: Tensor, true: Tensor, step: float, limits: Tensor, entries: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the next state, and which conditions begin and end at this step.

    Args:
        state: [parameters, conditions, 4].
        true: [parameters, conditions]; 1 or 0, NaN if an entry does not say.
        step: the number of the step.
        limits: the rules, from `make_limits`.
        entries: [parameters, conditions]; how many entries are needed, where that is more than the
            rule says.
    """
    run, since, off, active = state.unbind(2)
    is_active = active > 0
    yes, no = true == 1, true == 0
    since = torch.where(yes & (run == 0), step, since)
    run = torch.where(yes, run + 1, run)
    run = torch.where(no & ~is_active, 0.0, run)
    off = torch.where(yes, 0.0, off + no)
    needed = limits[0] if entries is None else torch.maximum(limits[0], entries)
    begun = yes & ~is_active & (run >= needed) & (step - since >= limits[1])
    ended = is_active & (off >= limits[2])
    is_active = (is_active | begun) & ~ended
    run = torch.where(ended, 0.0, run)
    return torch.stack((run, since, off, is_active.to(torch.float64)), 2), begun, ended


def make_limits(rules: Sequence[Rule]) -> Tensor:
    """Return the rules as a tensor, [3, conditions]."""
    return torch.tensor(rules, dtype=torch.float64, device="cpu").T.contiguous()
