"""The conditions of single parameters that a `Monitor` checks in every entry.

Each is computed for all parameters at once, with torch operators.
"""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

import torch
from torch import Tensor

from paramstats._findings.over_time.conditions import ACTIVE, RUN, Rule
from paramstats._findings.over_time.entry import AWAY, Now
from paramstats._findings.over_time.tracks import NAN, STAT, WINDOW
from paramstats._findings.thresholds import Thresholds

_NORM, _ZEROS, _NONFINITE = STAT["norm"], STAT["zero_fraction"], STAT["nonfinite_count"]

_MIN_SPREAD = 0.1
"""Added to the spread of log norms: a constant gradient that changes by 10 % is no spike."""

_SMALL_SPIKE = 0.1
"""A gradient below this fraction of its weight is no spike, by whatever factor it has grown."""

SMALL_GRADIENT = 1e-5
"""A gradient below this fraction of its parameter may not change it, because of rounding."""

_NEW_ZEROS = 0.25
"""Units may have died if this fraction of a gradient has become zero."""

_FALLEN = 0.77
"""A weight shrinks if its norm has fallen to this fraction within the window."""

_SMALLER = 0.995
"""Whether weights shrink is looked at if the norms of most are below this fraction of the last."""

_KEPT = 0.8
"""The factor of the moving average of noise, per entry."""

_MAX_AWAY = WINDOW // 2
"""Entries after which a level that is not remarkable is accepted as the new normal."""


_REPLACED = 0.5
"""A weight that changes by this fraction of its norm in a step is remarkable, even if no other is.
"""


class Condition(enum.IntEnum):
    """A condition of one parameter; the position of its column in `State.conditions`."""

    UNCHANGED = 0
    LARGE = 1
    GROWN = 2
    SHRUNK = 3
    CLAMPED = 4
    SPIKE = 5
    COLLAPSE = 6
    ZERO = 7
    LOST = 8
    SMALL = 9
    OUTSIDE = 10


RULES = {
    Condition.UNCHANGED: Rule(4, 9, 1),
    Condition.LARGE: Rule(1, 0, 3),
    Condition.GROWN: Rule(1, 0, 3),
    Condition.SHRUNK: Rule(3, 0, 3),
    Condition.CLAMPED: Rule(4, 9, 2),
    Condition.SPIKE: Rule(1, 0, 3),
    Condition.COLLAPSE: Rule(5, 5, 3),
    Condition.ZERO: Rule(4, 10, 2),
    Condition.LOST: Rule(4, 10, 1),
    Condition.SMALL: Rule(4, 10, 1),
    Condition.OUTSIDE: Rule(1, 0, 50),
}


class Screen(NamedTuple):
    """How many parameters there are of which something may be true; see `screen`."""

    happens: int
    away: int
    stays: int
    zeros: int
    nonfinite: int
    grads: int
    smaller: int


def screen(now: Now, limits: Thresholds) -> Screen:
    """Return what the entry may contain, so that the other functions are called for that only.

    That is rare, and they take more time. Returns the number of parameters

    - of which a condition may be true, except that of gradients that left their past;
    - whose gradient has left its past;
    - whose smallest or largest element stays;
    - of whose gradient many more elements are zero than in the previous entry;
    - with NaN or Inf;
    - with a gradient;
    - with two or more dimensions, whose norm has become smaller by half a percent.
    """
    plan, rows, numbers, norm = now.plan, now.rows, now.rows.numbers, now.norm
    old_norm = rows.value[:, _NORM]
    found = (now.change > limits.largest_change) | (norm > numbers["upper"])
    found |= (norm < numbers["lower"]) | (now.grad_norm == 0)
    found &= plan.weights
    found |= now.trained & (norm == old_norm)
    found |= plan.trainable & (numbers["with_grad"] > 0) & ~now.has_grad
    if now.update is not None:
        found |= _is_small(now, limits) | (now.other_change > 0)
    masks = (
        found,
        now.outside | now.was_away,
        now.stays.any(1),
        now.grad[:, _ZEROS] - rows.grad[:, _ZEROS] > _NEW_ZEROS,
        (now.value[:, _NONFINITE] > 0) | (now.grad[:, _NONFINITE] > 0),
        now.has_grad,
        plan.weights & (norm < _SMALLER * old_norm),
    )
    return Screen._make(torch.stack(masks).sum(1).tolist())


def leave_past(now: Now) -> None:
    """Remember the past of the gradients that leave it: the window of their latest entries.

    What is outside of the window is not added to it until it has returned, or until it is clear
    that it is an ordinary new level.
    """
    numbers, left = now.rows.numbers, now.outside & ~now.was_away
    if bool(left.any()):
        median, spread = _robust(now.rows.grads[left], numbers["samples"][left])
        numbers["past"], numbers["spread"] = numbers["past"].clone(), numbers["spread"].clone()
        numbers["past"][left], numbers["spread"][left] = median, spread
        numbers["onset"] = torch.where(left, now.step, numbers["onset"])
        numbers["away"] = torch.where(left, 0.0, numbers["away"])
    numbers["away"] = numbers["away"] + (left | now.was_away)


def come_back(now: Now) -> None:
    """Forget that a gradient left its past where it has returned or has an ordinary new level."""
    numbers, x = now.rows.numbers, now.log_grad
    active = now.rows.conditions[:, Condition.SPIKE : Condition.COLLAPSE + 1, ACTIVE].amax(1) > 0
    returned = (x - numbers["past"]).abs() < AWAY
    back = ~active & (returned | (numbers["away"] >= _MAX_AWAY))
    numbers["onset"] = torch.where(back, NAN, numbers["onset"])


def remember(now: Now, limits: Thresholds) -> None:
    """Add the entry to the state."""
    rows, numbers, x = now.rows, now.rows.numbers, now.log_grad
    add = now.is_finite & ~(numbers["onset"] > -math.inf)
    at = (numbers["samples"] % WINDOW).to(torch.int64)[:, None]
    rows.grads.scatter_(1, at, torch.where(add[:, None], x[:, None], rows.grads.gather(1, at)))
    at = (numbers["entries"] % WINDOW).to(torch.int64)[:, None, None].expand(-1, 2, 1)
    step = torch.full_like(x, now.step)
    rows.norms.scatter_(2, at, torch.stack((now.norm, step), 1)[:, :, None])
    delta = x - rows.grad[:, _NORM].log()
    noise, change = numbers["noise"], (delta - numbers["delta"]).abs()
    noise = torch.where(noise == noise, _KEPT * noise + (1 - _KEPT) * change, change)
    numbers["noise"] = torch.where(change < math.inf, noise, numbers["noise"])
    numbers["delta"] = delta
    rows.value, rows.grad = now.value, now.grad
    first = add & (numbers["samples"] == 0) | ~(numbers["first_norm"] > 0)
    if bool(first.any()):
        _begin(now, add, limits)
    numbers["samples"] = numbers["samples"] + add
    numbers["not_zero"] = numbers["not_zero"] + (now.grad_norm > 0)
    numbers["with_grad"] = numbers["with_grad"] + now.has_grad
    numbers["entries"] = numbers["entries"] + 1
    numbers["last_step"] = step
    if now.update is not None:
        update = now.update.nan_to_num(0.0)
        numbers["largest_update"] = torch.maximum(numbers["largest_update"], update)


def _is_small(now: Now, limits: Thresholds) -> Tensor:
    """Return which updates are small, though gradients are not, and have always been."""
    if now.update is None:
        return torch.zeros_like(now.trained)
    is_small = (now.update < limits.smallest_update) & (now.relative_grad > SMALL_GRADIENT)
    largest = now.rows.numbers["largest_update"]
    return is_small & now.plan.weights & now.trained & (largest < 10 * limits.smallest_update)


def _begin(now: Now, add: Tensor, limits: Thresholds) -> None:
    """Fill windows with their first element, and find the norms to compare later ones with."""
    rows, numbers = now.rows, now.rows.numbers
    first = add & (numbers["samples"] == 0)
    rows.grads = torch.where(first[:, None], now.log_grad[:, None], rows.grads)
    is_new = numbers["entries"] == 0
    latest = torch.stack((now.norm, torch.full_like(now.norm, now.step)), 1)[:, :, None]
    rows.norms = torch.where(is_new[:, None, None], latest, rows.norms)
    new = ~(numbers["first_norm"] > 0) & (now.norm > 0)
    norm = torch.where(new, now.norm, numbers["first_norm"])
    numbers["first_norm"], numbers["lower"] = norm, limits.weight_collapse * norm
    numbers["upper"] = limits.weight_growth * torch.maximum(norm, now.plan.usual_norm)


def conditions(now: Now, limits: Thresholds) -> tuple[Tensor, Tensor]:
    """Return the conditions of an entry: whether they are true, and whether they are not.

    Both are [parameters, conditions]; an entry may say neither.
    """
    plan, rows, numbers = now.plan, now.rows, now.rows.numbers
    norm, relative, trained = now.norm, now.relative_grad, now.trained
    weights = plan.weights & plan.trainable
    is_weight = weights & (norm == norm)

    can_change = trained & now.new_grad & (relative > SMALL_GRADIENT) & (now.steps > 0)
    changes = ~now.same
    unchanged = can_change & now.same
    if bool(unchanged.any()):
        unchanged &= (can_change & changes).any()

    trained_before = weights & (trained | (rows.grad[:, 0] >= 0))
    large = trained_before & (now.change > limits.largest_change) & (norm < math.inf)
    if bool(large.any()):  # a learning rate that is too high is so for many weights
        known = trained_before & (now.change == now.change)
        large &= (now.change > _REPLACED) | (3 * large.sum() >= known.sum())
    grown = weights & (norm > numbers["upper"]) & (norm < math.inf)
    shrunk = weights & (norm < numbers["lower"])
    if bool(shrunk.any()):
        shrunk &= norm < _FALLEN * now.oldest[:, 0]
        shrunk &= now.value[:, STAT["zero_fraction"]] < 0.5

    is_away = (numbers["onset"] > -math.inf) & weights
    away = now.log_grad - numbers["past"]
    spike = is_away & (away > _log(limits.spike)) & (relative > _SMALL_SPIKE)
    unknown = 1.5 / numbers["samples"]  # of the spread of few samples
    spike &= away > limits.spike_score * (1.4826 * numbers["spread"] + _MIN_SPREAD + unknown)
    collapse = is_away & (away < _log(limits.gradient_collapse))
    if bool(collapse.any()):  # not if all gradients have become smaller
        collapse &= away - _common_change(now, collapse) < _log(limits.gradient_collapse)

    is_zero = plan.weights & (now.grad[:, STAT["zero_fraction"]] == 1)
    may_miss = plan.trainable & (numbers["with_grad"] > 0)
    lost = may_miss & ~now.has_grad & trained.any()
    small = _is_small(now, limits)
    outside = inside = torch.zeros_like(small)
    if now.update is not None:
        outside, inside = now.other_change > 0, now.other_change == 0
    yes = [unchanged, large, grown, shrunk, now.clamped, spike, collapse, is_zero, lost]
    yes += [small, outside]
    no = (
        changes,
        trained_before & (now.change <= limits.largest_change),
        is_weight & ~grown,
        is_weight & ~shrunk,
        is_weight & ~now.clamped,
        now.is_finite & ~spike,
        now.is_finite & ~collapse,
        now.has_grad & ~is_zero,
        now.has_grad,
        now.has_grad & ~small,
        inside,
    )
    # What is frozen has no condition any more.
    return torch.stack(yes, 1), torch.stack(no, 1) | ~plan.trainable[:, None]


def needed_entries(now: Now) -> Tensor:
    """Return how many entries each condition must last, if that depends on the past."""
    numbers, run = now.rows.numbers, now.rows.conditions[:, :, RUN]
    needed = torch.zeros_like(run)
    needed[:, Condition.LARGE] = torch.where(now.change > 1, 1.0, 3.0)
    for condition, seen, of in (
        (Condition.ZERO, "not_zero", "with_grad"),
        (Condition.LOST, "with_grad", "entries"),
    ):
        before = numbers[of] - run[:, condition]
        is_enough = _is_surprising(numbers[seen], before, run[:, condition] + 1)
        needed[:, condition] = torch.where(is_enough, 0.0, math.inf)
    return needed


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _robust(past: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return the median and the median absolute deviation of the samples in rows of a window."""
    position = torch.arange(WINDOW, dtype=torch.float64, device="cpu")
    past = torch.where(position < samples[:, None], past, NAN)
    median = past.nanmedian(1).values
    return median, (past - median[:, None]).abs().nanmedian(1).values


def _common_change(now: Now, collapse: Tensor) -> Tensor:
    """Return by how much the logarithms of the gradients' norms have changed, as a median.

    If the gradients of (almost) all weights up to some layer have collapsed, it is the median of
    the weights after that layer. When a model converges, these fall as well.
    """
    change = now.log_grad - now.rows.grads.median(1).values
    last = int(collapse.nonzero()[-1])
    use = now.plan.weights & (change > -math.inf)
    if float(collapse.sum()) >= 0.9 * float(use[: last + 1].sum()) and bool(use[last + 1 :].any()):
        change = change[last + 1 :][use[last + 1 :]]
    return change.nanmedian().clamp(max=0.0)


def _is_surprising(seen: Tensor, of: Tensor, run: Tensor) -> Tensor:
    """Return whether so many absences in a row are unlikely, given the entries before them.

    That is their probability if nothing is known of the rate of presence but these entries (its
    prior is uniform). It must be below 1e-4, or 1e-6 if there were absences before.

    Args:
        seen, of: in how many of the entries before it was present.
        run: the number of absences.
    """
    absent = of - seen
    log = (absent + run + 1).lgamma() - (absent + 1).lgamma()
    log = log + (of + 2).lgamma() - (of + run + 2).lgamma()
    limit = torch.where(absent > 0, math.log(1e-6), math.log(1e-4))
    return (seen == 0) | (log < limit)
