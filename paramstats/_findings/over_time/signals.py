"""The conditions of single parameters that a `Monitor` checks in every entry.

Each is computed for all parameters at once, with torch operators.
"""

from __future__ import annotations

import enum
import math
from functools import cached_property

import torch
from torch import Tensor

from paramstats._findings.over_time.conditions import ACTIVE, RUN, Rule
from paramstats._findings.over_time.tracks import NAN, STAT, WINDOW, Plan, Rows
from paramstats._findings.thresholds import Thresholds

_NORM, _MIN, _MAX = STAT["norm"], STAT["min"], STAT["max"]
_COMPARED = STAT["zero_fraction"]
"""The number of leading columns that are compared; the count of zeros is the last one."""

_MIN_SAMPLES = 4
"""Entries before an entry is compared with their median."""

_AWAY = math.log(3)
"""A gradient leaves its past if its norm is more than this factor outside of the window."""

_MIN_SPREAD = 0.1
"""Added to the spread of log norms: a constant gradient that changes by 10 % is no spike."""

_SMALL_SPIKE = 0.1
"""A gradient below this fraction of its weight is no spike, by whatever factor it has grown."""

SMALL_GRADIENT = 1e-5
"""A gradient below this fraction of its parameter may not change it, because of rounding."""

_NEW_ZEROS = 0.25
"""Units may have died if this fraction of a gradient has become zero."""

_FALLING = math.log(1.3)
"""A weight shrinks if its norm has fallen by this factor within the window."""

_MAX_AWAY = WINDOW // 2
"""Entries after which a level that is not remarkable is accepted as the new normal."""


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


RULES = {
    Condition.UNCHANGED: Rule(4, 9, 1),
    Condition.LARGE: Rule(1, 0, 3),
    Condition.GROWN: Rule(2, 0, 3),
    Condition.SHRUNK: Rule(3, 0, 3),
    Condition.CLAMPED: Rule(4, 9, 2),
    Condition.SPIKE: Rule(1, 0, 3),
    Condition.COLLAPSE: Rule(5, 5, 3),
    Condition.ZERO: Rule(4, 10, 2),
    Condition.LOST: Rule(4, 10, 1),
    Condition.SMALL: Rule(4, 10, 1),
}


class Now:
    """An entry, compared with the state before it; one row per parameter.

    Args:
        step: the number of the step.
        plan: of the entry's layout.
        rows: the state.
        value: the statistics of the parameters; NaN where they were not read.
        grad: the statistics of the gradients; NaN where there are none.
        correction: that of the standard deviations.
        updates: the norms of the last updates; NaN where they are not known.
    """

    def __init__(
        self,
        step: int,
        plan: Plan,
        rows: Rows,
        value: Tensor,
        grad: Tensor,
        correction: float,
        updates: Tensor | None = None,
    ) -> None:
        self.step = float(step)
        self.plan = plan
        self.rows = rows
        self.value = value
        self.grad = grad
        self.norm = value[:, _NORM]
        self.grad_norm = grad[:, _NORM]
        self.log_grad = self.grad_norm.log()
        """NaN without a gradient, -inf for one of zeros."""
        self.has_grad = grad[:, 0] >= 0  # the count is known, also of a gradient with NaN
        self.steps = self.step - rows.numbers["last_step"]
        """The steps since the previous entry of the parameter; NaN without one."""
        self.trained = plan.trainable & self.has_grad
        self.update = None  # as a fraction of the parameter's norm or that of a new one
        if updates is not None:
            self.update = updates / torch.maximum(self.norm, plan.usual_norm)
        self._correction = correction

    @cached_property
    def change(self) -> Tensor:
        """A lower bound of the norm of the change since the previous entry, per step.

        As a fraction of the larger one of the norm in the previous entry and that of a new weight.
        NaN if it is not known.
        """
        value, before = self.value, self.rows.before[:, 0]
        count, mean, std = value[:, 0], STAT["mean"], STAT["std"]
        difference = value - before
        deviation = difference[:, std].nan_to_num(0.0)  # NaN for one element
        deviation *= (count - self._correction).clamp(min=0).sqrt()
        bound = torch.hypot(deviation, difference[:, mean] * count.sqrt())
        return bound / (torch.maximum(before[:, _NORM], self.plan.usual_norm) * self.steps)

    @cached_property
    def same(self) -> Tensor:
        """Whether all statistics of the parameter are those of the previous entry."""
        return (self.value[:, :_COMPARED] == self.rows.before[:, 0, :_COMPARED]).all(1)

    @cached_property
    def new_grad(self) -> Tensor:
        """Whether a statistic of the gradient is not that of the previous entry."""
        return (self.grad[:, :_COMPARED] != self.rows.before[:, 1, :_COMPARED]).any(1)

    @cached_property
    def relative_grad(self) -> Tensor:
        """The norm of the gradient / the larger one of that of the parameter and of a new one."""
        return self.grad_norm / torch.maximum(self.norm, self.plan.usual_norm)

    @cached_property
    def clamped(self) -> Tensor:
        """Whether the largest or smallest element stays at a bound while others change.

        An element that is never updated, such as that of a token that does not occur, may be the
        largest one, too. A bound is recognized if it is a number of up to three digits, or if the
        smallest and the largest elements are opposite.
        """
        value, before = self.value[:, _MIN : _MAX + 1], self.rows.before[:, 0, _MIN : _MAX + 1]
        stays = (value == before) & (self.plan.weights & self.plan.is_precise)[:, None]
        if not bool(stays.any()):
            return stays[:, 0]
        is_bound = (stays & _is_short(value)).any(1)
        is_bound |= stays.all(1) & (value[:, 0] == -value[:, 1])
        return is_bound & (value[:, 1] > value[:, 0]) & ~self.same

    @cached_property
    def oldest(self) -> Tensor:
        """The log norms of the parameters in the first entry of the window, and its step."""
        at = (self.rows.numbers["entries"] % WINDOW).to(torch.int64)
        return self.rows.norms.gather(2, at[:, None, None].expand(-1, 2, 1))[:, :, 0]


def leave_past(now: Now) -> bool:
    """Find the gradients that leave their past: the window of their latest entries.

    What is outside of the window is not added to it until it has returned, or until it is clear
    that it is an ordinary new level.

    Returns:
        Whether a gradient is outside of its past.
    """
    numbers, past, x = now.rows.numbers, now.rows.grads, now.log_grad
    outside = (x > past.amax(1) + _AWAY) | (x < past.amin(1) - _AWAY)
    outside &= (numbers["samples"] >= _MIN_SAMPLES) & (x.abs() < math.inf)
    was_away = numbers["onset"] > -math.inf
    is_away = outside | was_away
    if not bool(is_away.any()):
        return False
    left = outside & ~was_away
    if bool(left.any()):
        median, spread = _robust(past[left], numbers["samples"][left])
        numbers["past"], numbers["spread"] = numbers["past"].clone(), numbers["spread"].clone()
        numbers["past"][left], numbers["spread"][left] = median, spread
        numbers["onset"] = torch.where(left, now.step, numbers["onset"])
        numbers["away"] = torch.where(left, 0.0, numbers["away"])
    numbers["away"] = numbers["away"] + is_away
    return True


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
    add = (x.abs() < math.inf) & ~(numbers["onset"] > -math.inf)
    rows.grads = _put(rows.grads[:, None], numbers["samples"], add, x[:, None])[:, 0]
    norm = torch.stack((now.norm.log(), torch.full_like(x, now.step)), 1)
    rows.norms = _put(rows.norms, numbers["entries"], norm[:, 0].abs() < math.inf, norm)
    rows.before = torch.stack((now.value, now.grad), 1)
    numbers["samples"] = numbers["samples"] + add
    numbers["not_zero"] = numbers["not_zero"] + (now.grad_norm > 0)
    numbers["with_grad"] = numbers["with_grad"] + now.has_grad
    new = ~(numbers["first_norm"] > 0)
    if bool(new.any()):
        numbers["first_norm"] = torch.where(new & (now.norm > 0), now.norm, numbers["first_norm"])
        first = numbers["entries"] == 0
        numbers["first_step"] = torch.where(first, now.step, numbers["first_step"])
    if now.update is not None:
        update = now.update.nan_to_num(0.0)
        numbers["largest_update"] = torch.maximum(numbers["largest_update"], update)
    numbers["entries"] = numbers["entries"] + 1
    numbers["last_step"] = torch.full_like(x, now.step)


def _put(ring: Tensor, count: Tensor, add: Tensor, new: Tensor) -> Tensor:
    """Return a ring, [parameters, series, window], with another element where `add` is true.

    `count` is how many were added before. The first one fills the ring.
    """
    at = (count % WINDOW).to(torch.int64)[:, None, None].expand(-1, ring.shape[1], 1)
    new = new[:, :, None]
    out = ring.scatter(2, at, torch.where(add[:, None, None], new, ring.gather(2, at)))
    first = add & (count == 0)
    return torch.where(first[:, None, None], new, out) if bool(first.any()) else out


def may_happen(now: Now, limits: Thresholds) -> bool:
    """Return whether a condition may be true, except those of gradients that left their past.

    That is rare, and the other functions take more time.
    """
    plan, rows, numbers, norm = now.plan, now.rows, now.rows.numbers, now.norm
    usual = torch.maximum(numbers["first_norm"], plan.usual_norm)
    of_weights = (now.change > limits.largest_change) | (norm > limits.weight_growth * usual)
    of_weights |= (norm < limits.weight_collapse * numbers["first_norm"]) | (now.grad_norm == 0)
    found = (now.trained & (norm == rows.before[:, 0, _NORM])) | now.clamped
    found |= plan.weights & of_weights
    found |= plan.trainable & (numbers["with_grad"] > 0) & ~now.has_grad
    if now.update is not None:
        found |= _is_small(now, limits)
    return bool(found.any()) or not bool(now.has_grad.any())


def _is_small(now: Now, limits: Thresholds) -> Tensor:
    """Return which updates are small, though gradients are not, and have always been."""
    if now.update is None:
        return torch.zeros_like(now.trained)
    is_small = (now.update < limits.smallest_update) & (now.relative_grad > SMALL_GRADIENT)
    largest = now.rows.numbers["largest_update"]
    return is_small & now.plan.weights & now.trained & (largest < 10 * limits.smallest_update)


def has_new_zeros(now: Now) -> bool:
    """Return whether many more elements of a gradient are zero than in the previous entry."""
    zeros = STAT["zero_fraction"]
    return bool((now.grad[:, zeros] - now.rows.before[:, 1, zeros] > _NEW_ZEROS).any())


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

    trained_before = weights & (trained | (rows.before[:, 1, 0] >= 0))
    large = trained_before & (now.change > limits.largest_change)
    usual = torch.maximum(numbers["first_norm"], plan.usual_norm)
    grown = weights & (norm > limits.weight_growth * usual)
    shrunk = weights & (norm < limits.weight_collapse * numbers["first_norm"])
    if bool(shrunk.any()):
        shrunk &= norm.log() - now.oldest[:, 0] < -_FALLING
        shrunk &= now.value[:, STAT["zero_fraction"]] < 0.5

    is_away = (numbers["onset"] > -math.inf) & weights
    away = now.log_grad - numbers["past"]
    spike = is_away & (away > math.log(limits.spike)) & (relative > _SMALL_SPIKE)
    unknown = 1.5 / numbers["samples"]  # of the spread of few samples
    spike &= away > limits.spike_score * (1.4826 * numbers["spread"] + _MIN_SPREAD + unknown)
    collapse = is_away & (away < math.log(limits.gradient_collapse))
    if bool(collapse.any()):  # not if all gradients have become smaller
        collapse &= away - _common_change(now) < math.log(limits.gradient_collapse)
    finite = now.log_grad.abs() < math.inf

    is_zero = plan.weights & (now.grad[:, STAT["zero_fraction"]] == 1)
    may_miss = plan.trainable & (numbers["with_grad"] > 0)
    lost = may_miss & ~now.has_grad & trained.any()
    small = _is_small(now, limits)
    yes = (unchanged, large, grown, shrunk, now.clamped, spike, collapse, is_zero, lost, small)
    no = (
        changes,
        trained_before & (now.change <= limits.largest_change),
        is_weight & ~grown,
        is_weight & ~shrunk,
        is_weight & ~now.clamped,
        finite & ~spike,
        finite & ~collapse,
        now.has_grad & ~is_zero,
        now.has_grad,
        now.has_grad & ~small,
    )
    return torch.stack(yes, 1), torch.stack(no, 1)


def needed_entries(now: Now) -> Tensor:
    """Return how many entries each condition must last, if that depends on the past."""
    numbers, run = now.rows.numbers, now.rows.conditions[:, :, RUN]
    needed = torch.zeros_like(run)
    needed[:, Condition.LARGE] = torch.where(now.change > 1, 1.0, 2.0)
    before = numbers["with_grad"] - run[:, Condition.ZERO]
    needed[:, Condition.ZERO] = _surprising(numbers["not_zero"], before)
    before = numbers["entries"] - run[:, Condition.LOST]
    needed[:, Condition.LOST] = _surprising(numbers["with_grad"], before)
    return needed


def _is_short(x: Tensor) -> Tensor:
    """Return whether x, rounded to float32, is a decimal number of at most three digits."""
    unit = 10.0 ** (x.abs().log10().floor() - 2)
    return ((x / unit).round() * unit - x).abs() <= 6e-8 * x.abs()


def _robust(past: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return the median and the median absolute deviation of the samples in rows of a window."""
    position = torch.arange(WINDOW, dtype=torch.float64, device="cpu")
    past = torch.where(position < samples[:, None], past, NAN)
    median = past.nanmedian(1).values
    return median, (past - median[:, None]).abs().nanmedian(1).values


def _common_change(now: Now) -> Tensor:
    """Return by how much the logarithms of the gradients' norms have changed, as a median."""
    change = now.log_grad - now.rows.grads.median(1).values
    return change.nanmedian().clamp(max=0.0)


def _surprising(seen: Tensor, of: Tensor) -> Tensor:
    """Return how many absences in a row have a probability below 1e-6.

    Args:
        seen, of: in how many of the entries it was present.
    """
    share = (seen / of.clamp(min=1)).clamp(max=0.97)
    return torch.where(seen > 0, math.log(1e-6) / (1 - share).log(), 0.0)
