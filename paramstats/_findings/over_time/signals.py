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
from paramstats._findings.over_time.tracks import NAN, STAT, WINDOW, Plan, Rows
from paramstats._findings.thresholds import Thresholds

_NORM, _MIN, _MAX = STAT["norm"], STAT["min"], STAT["max"]
_COMPARED = STAT["zero_fraction"]
"""The number of leading columns that are compared; the count of zeros is the last one."""

_MIN_SAMPLES = 8
"""Entries before an entry is compared with their median."""

_AWAY = math.log(3)
"""A gradient leaves its past if its norm is more than this factor outside of the window."""

_MIN_SPREAD = 0.1
"""Added to the spread of log norms: a constant gradient that changes by 10 % is no spike."""

_SMALL_SPIKE = 0.1
"""A gradient below this fraction of its weight is no spike, by whatever factor it has grown."""

_SMALL_GRADIENT = 1e-5
"""A gradient below this fraction of its parameter may not change it, because of rounding."""

_FALLING = math.log(1.3)
"""A weight shrinks if its norm has fallen by this factor within the window."""

_MAX_AWAY = WINDOW // 2
"""Entries after which a level that is not remarkable is accepted as the new normal."""


class Condition(enum.IntEnum):
    """A condition of one parameter; the position of its column in `State.conditions`."""

    UNCHANGED = 0
    LARGE = 1
    VERY_LARGE = 2
    GROWN = 3
    SHRUNK = 4
    CLAMPED = 5
    SPIKE = 6
    COLLAPSE = 7
    ZERO = 8
    LOST = 9


RULES = {
    Condition.UNCHANGED: Rule(4, 9, 1),
    Condition.LARGE: Rule(2, 0, 3),
    Condition.VERY_LARGE: Rule(1, 0, 3),
    Condition.GROWN: Rule(2, 0, 3),
    Condition.SHRUNK: Rule(3, 0, 3),
    Condition.CLAMPED: Rule(4, 9, 2),
    Condition.SPIKE: Rule(1, 0, 3),
    Condition.COLLAPSE: Rule(5, 5, 3),
    Condition.ZERO: Rule(10, 10, 2),
    Condition.LOST: Rule(10, 10, 1),
}


class Now(NamedTuple):
    """An entry, compared with the state before it; one row per parameter."""

    step: float
    plan: Plan
    rows: Rows
    value: Tensor
    """The statistics of the parameter; NaN if it was not read."""
    grad: Tensor
    """The statistics of the gradient; NaN if there is none."""
    steps: Tensor
    """The steps since the previous entry of the parameter; NaN without one."""
    change: Tensor
    """A lower bound of the norm of the change since then; NaN if it is not known."""
    scale: Tensor
    """The larger one of the norm in the previous entry and that of a new weight."""
    same: Tensor
    """Whether all statistics of the parameter are those of the previous entry."""
    has_grad: Tensor
    log_grad: Tensor
    """The logarithm of the norm of the gradient; NaN if that is zero or not finite."""

    @property
    def norm(self) -> Tensor:
        return self.value[:, _NORM]

    @property
    def relative_grad(self) -> Tensor:
        """The norm of the gradient / the larger one of that of the parameter and of a new one."""
        return self.grad[:, _NORM] / torch.maximum(self.norm, self.plan.usual_norm)


def observe(
    step: float, plan: Plan, rows: Rows, value: Tensor, grad: Tensor, correction: float
) -> Now:
    """Compare an entry with the previous one."""
    before = rows.before[:, 0]
    count, mean, std = value[:, STAT["count"]], STAT["mean"], STAT["std"]
    freedom = (count - correction).clamp(min=0).sqrt()
    deviations = (value[:, std] - before[:, std]).nan_to_num(0.0) * freedom  # NaN for one element
    change = torch.hypot(deviations, (value[:, mean] - before[:, mean]) * count.sqrt())
    norm = grad[:, _NORM]
    return Now(
        step,
        plan,
        rows,
        value,
        grad,
        step - rows.numbers["last_step"],
        torch.where(count == before[:, STAT["count"]], change, NAN),
        torch.maximum(before[:, _NORM], plan.usual_norm),
        (value[:, :_COMPARED] == before[:, :_COMPARED]).all(1),
        grad[:, 0] == grad[:, 0],  # the count is known, also of a gradient with NaN
        torch.where((norm > 0) & (norm < math.inf), norm, NAN).log(),
    )


def leave_past(now: Now) -> None:
    """Find the gradients that leave their past: the window of their latest entries.

    What is outside of the window is not added to it until it has returned, or until it is clear
    that it is an ordinary new level.
    """
    numbers, past, x = now.rows.numbers, now.rows.window[:, 0], now.log_grad
    was_away = numbers["onset"] == numbers["onset"]
    outside = (x > past.amax(1) + _AWAY) | (x < past.amin(1) - _AWAY)
    left = outside & ~was_away & (numbers["samples"] >= _MIN_SAMPLES)
    if bool(left.any()):
        median, spread = _robust(past[left], numbers["samples"][left])
        numbers["past"], numbers["spread"] = numbers["past"].clone(), numbers["spread"].clone()
        numbers["past"][left], numbers["spread"][left] = median, spread
        numbers["onset"] = torch.where(left, now.step, numbers["onset"])
        numbers["away"] = torch.where(left, 0.0, numbers["away"])
    is_away = was_away | left
    numbers["away"] = numbers["away"] + (is_away & (x == x))


def come_back(now: Now) -> None:
    """Forget that a gradient left its past where it has returned or has an ordinary new level."""
    numbers, x = now.rows.numbers, now.log_grad
    active = now.rows.conditions[:, Condition.SPIKE : Condition.COLLAPSE + 1, ACTIVE].amax(1) > 0
    returned = (x - numbers["past"]).abs() < _AWAY
    back = ~active & (returned | (numbers["away"] >= _MAX_AWAY))
    numbers["onset"] = torch.where(back, NAN, numbers["onset"])


def remember(now: Now) -> None:
    """Add the entry to the state."""
    rows, numbers, x = now.rows, now.rows.numbers, now.log_grad
    is_away = numbers["onset"] == numbers["onset"]
    step = torch.full_like(x, now.step)
    new = torch.stack((x, now.norm.log(), step), 1)[:, :, None]
    window = torch.cat((rows.window[:, :, 1:], new), 2)
    window = torch.where(rows.window[:, :, :1].isnan(), new, window)
    keep = ~(new[:, :, 0].abs() < math.inf)
    keep[:, 0] |= is_away
    rows.window = torch.where(keep[:, :, None], rows.window, window)
    rows.before = torch.stack((now.value, now.grad), 1)
    numbers["samples"] = numbers["samples"] + (x == x)
    numbers["with_grad"] = numbers["with_grad"] + now.has_grad
    numbers["entries"] = numbers["entries"] + 1
    numbers["first_step"] = torch.where(numbers["first_step"].isnan(), step, numbers["first_step"])
    first = numbers["first_norm"].isnan() & (now.norm > 0)
    numbers["first_norm"] = torch.where(first, now.norm, numbers["first_norm"])
    numbers["last_step"] = step


def conditions(now: Now, limits: Thresholds) -> tuple[Tensor, Tensor]:
    """Return the conditions of an entry, and how many entries they must last.

    Both are [parameters, conditions]: 1 or 0, and NaN where the entry does not say.
    """
    plan, rows, numbers = now.plan, now.rows, now.rows.numbers
    x, norm, relative = now.log_grad, now.norm, now.relative_grad
    grad_norm = now.grad[:, _NORM]
    trained = plan.trainable & now.has_grad
    weights = plan.weights & plan.trainable
    new_grad = ~(now.grad[:, :_COMPARED] == rows.before[:, 1, :_COMPARED]).all(1)

    can_change = trained & new_grad & (relative > _SMALL_GRADIENT) & (now.steps > 0) & (norm >= 0)
    changes = can_change & ~now.same
    unchanged = torch.where(can_change & changes.any(), now.same.to(torch.float64), NAN)
    unchanged = torch.where(now.same, unchanged, 0.0)

    large = now.change / now.steps / now.scale
    large = torch.where(weights & (trained | (rows.before[:, 1, 0] >= 0)), large, NAN)

    first = torch.maximum(numbers["first_norm"], plan.usual_norm)
    grown = weights & (norm > limits.weight_growth * first)
    fallen = norm.log() - rows.window[:, 1, 0] < -_FALLING
    few_zeros = now.value[:, STAT["zero_fraction"]] < 0.5
    shrunk = weights & fallen & few_zeros & (norm < limits.weight_collapse * numbers["first_norm"])

    away = x - numbers["past"]
    is_away = numbers["onset"] == numbers["onset"]
    score = away / (1.4826 * numbers["spread"] + _MIN_SPREAD)
    spike = is_away & (away > math.log(limits.spike)) & (score > limits.spike_score)
    spike &= relative > _SMALL_SPIKE
    collapse = is_away & (away < math.log(limits.gradient_collapse))
    if bool(collapse.any()):  # not if all gradients have become smaller
        collapse &= away - _common_change(now) < math.log(limits.gradient_collapse)

    is_zero = now.grad[:, STAT["zero_fraction"]] == 1
    zero = torch.where(now.has_grad & plan.weights, is_zero.to(torch.float64), NAN)
    lost = trained.any() & (numbers["with_grad"] > 0)
    lost = torch.where(plan.trainable & lost, (~now.has_grad).to(torch.float64), NAN)

    true = torch.stack(
        (
            unchanged,
            _known(large > limits.largest_change, large),
            _known(large > 1, large),
            _known(grown, norm),
            _known(shrunk, norm),
            _clamped(now),
            _known(spike, x),
            _known(collapse, x),
            zero,
            lost,
        ),
        1,
    )
    needed = torch.zeros_like(true)
    run = rows.conditions[:, :, RUN]
    needed[:, Condition.ZERO] = _surprising(
        numbers["samples"], numbers["with_grad"] - run[:, Condition.ZERO]
    )
    needed[:, Condition.LOST] = _surprising(
        numbers["with_grad"], numbers["entries"] - run[:, Condition.LOST]
    )
    return true, needed


def _known(condition: Tensor, statistic: Tensor) -> Tensor:
    """Return 1 or 0, and NaN where the statistic is."""
    return torch.where(statistic == statistic, condition.to(torch.float64), NAN)


def _clamped(now: Now) -> Tensor:
    """Return where the largest or smallest element stays at a bound while others change.

    An element that is never updated, such as that of a token that does not occur, may be the
    largest one, too. A bound is recognized if it is a number of up to three digits, or if the
    smallest and the largest elements are opposite.
    """
    value, before = now.value, now.rows.before[:, 0]
    low, high = value[:, _MIN], value[:, _MAX]
    low_stays, high_stays = low == before[:, _MIN], high == before[:, _MAX]
    stays = (low_stays | high_stays) & now.plan.weights & (value[:, _NORM] != before[:, _NORM])
    if not bool(stays.any()):
        return _known(stays, low)
    is_bound = (low_stays & _is_short(low)) | (high_stays & _is_short(high))
    is_bound &= now.plan.is_precise
    is_bound |= low_stays & high_stays & (low == -high)
    return _known(stays & is_bound & (high > low), low)


def _is_short(x: Tensor) -> Tensor:
    """Return whether x, rounded to float32, is a decimal number of at most three digits."""
    unit = 10.0 ** (x.abs().log10().floor() - 2)
    return ((x / unit).round() * unit - x).abs() <= 6e-8 * x.abs()


def _robust(past: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return the median and the median absolute deviation of the samples in rows of a window."""
    position = torch.arange(WINDOW, dtype=torch.float64, device="cpu")
    past = torch.where(position >= WINDOW - samples[:, None], past, NAN)
    median = past.nanmedian(1).values
    return median, (past - median[:, None]).abs().nanmedian(1).values


def _common_change(now: Now) -> Tensor:
    """Return by how much the logarithms of the gradients' norms have changed, as a median."""
    change = (now.log_grad - now.rows.window[:, 0].median(1).values).nanmedian()
    return change.clamp(max=0.0)


def _surprising(seen: Tensor, of: Tensor) -> Tensor:
    """Return how many absences in a row have a probability below 1e-6.

    Args:
        seen, of: in how many of the entries it was present.
    """
    share = (seen / of.clamp(min=1)).clamp(max=0.75)
    return torch.where(seen > 0, math.log(1e-6) / (1 - share).log(), 0.0)
