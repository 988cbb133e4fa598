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
    state: Tensor, yes: Tensor, no: Tensor, step: float, limits: Tensor, needed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the next state, and which conditions begin and end at this step.

    Args:
        state: [parameters, conditions, 4].
        yes, no: [parameters, conditions]; whether a condition is true, and whether it is not. An
            entry may say neither.
        step: the number of the step.
        limits: the rules, from `make_limits`.
        needed: [parameters, conditions]; the entries that a condition must last, if that is more
            than the rule says.
    """
    run, since, off, active = state.unbind(2)
    was_active = active > 0
    since = since + (yes & (run == 0)) * (step - since)
    run = (run + yes) * (~no | was_active)
    off = (off + no) * ~yes
    entries = limits[0] if needed is None else torch.maximum(limits[0], needed)
    begun = yes & ~was_active & (run >= entries) & (step - since >= limits[1])
    ended = was_active & (off >= limits[2])
    state = torch.stack((run * ~ended, since, off, (was_active | begun) & ~ended), 2)
    return state, begun, ended


def make_limits(rules: Sequence[Rule]) -> Tensor:
    """Return the rules as a tensor, [3, conditions]."""
    return torch.tensor(rules, dtype=torch.float64, device="cpu").T.contiguous()
