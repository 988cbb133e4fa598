"""An entry of a training, compared with what a `Monitor` remembers of the entries before it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from paramstats._findings.over_time.tracks import STAT, WINDOW, Plan, Rows, float64

_NORM, _MIN, _MAX = STAT["norm"], STAT["min"], STAT["max"]
_MEAN, _STD, _ZEROS = STAT["mean"], STAT["std"], STAT["zero_fraction"]

_COMPARED = slice(_NORM, _ZEROS)
"""The columns that are compared, with the mean. The std of a single element is NaN."""

_MASKED = 0.4
"""The share of a gradient's elements that are zero, from which on elements may be masked."""

_MIN_SAMPLES = 4
"""Entries before an entry is compared with their median."""

AWAY = math.log(3)
"""A gradient leaves its past if its norm is more than this factor outside of the window."""


class Now:
    """An entry, compared with the state before it; one row per parameter.

    Args:
        step: the number of the step.
        plan: of the entry's layout.
        rows: the state.
        value: the statistics of the parameters; NaN where they were not read.
        grad: the statistics of the gradients; NaN where there are none.
        correction: that of the standard deviations.
        updates: the statistics of the last updates; NaN where they are not known.
        hyperparameters: those of each parameter, such as "lr", as far as they are known.
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
        hyperparameters: Sequence[Mapping[str, float] | None] = (),
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
        self.is_finite = self.log_grad.abs() < math.inf
        self.has_grad = grad[:, 0] >= 0  # the count is known, also of a gradient with NaN
        self.steps = self.step - rows.numbers["last_step"]
        """The steps since the previous entry of the parameter; NaN without one."""
        self.trained = plan.trainable & self.has_grad
        self.update = None  # as a fraction of the parameter's norm or that of a new one
        if updates is not None:
            self.update = updates[:, _NORM] / torch.maximum(self.norm, plan.usual_norm)
        self.updates = updates
        self._correction = correction
        self._hyperparameters = hyperparameters

    def hyperparameter(self, key: str) -> Tensor:
        """Return the hyperparameter of each parameter; NaN where it is not known."""
        known = self._hyperparameters or [None] * len(self.norm)
        values = [math.nan if x is None else x.get(key, math.nan) for x in known]
        return float64(values[: len(self.norm)])

    @cached_property
    def _moved(self) -> tuple[Tensor, Tensor, Tensor]:
        """The changes of the mean and the std since the previous entry, and the root of count."""
        moved = self.value[:, _MEAN : _STD + 1] - self.rows.value[:, _MEAN : _STD + 1]
        root = (self.value[:, 0] - self._correction).clamp(min=0).sqrt()
        return moved[:, 0], moved[:, 1], root

    @cached_property
    def change(self) -> Tensor:
        """A lower bound of the norm of the change since the previous entry, per step.

        As a fraction of the larger one of the norm in the previous entry and that of a new weight.
        NaN if it is not known. Its mean and its deviations from the mean are orthogonal.
        """
        mean, std, root = self._moved
        scale = torch.maximum(self.rows.value[:, _NORM], self.plan.usual_norm) * self.steps
        return torch.hypot(mean, std) * root / scale

    @cached_property
    def other_change(self) -> Tensor:
        """A lower bound of the norm of the change that is not the optimizer's last update.

        0 if it may be rounding. NaN if it is not known, as if the previous entry is not that of the
        previous step. The change of the mean is the mean of the change.
        """
        assert self.updates is not None
        mean, std, root = self._moved
        update = self.updates[:, _NORM]
        other = (mean - self.updates[:, _MEAN]).abs() * root
        other = torch.maximum(other, torch.hypot(mean, std) * root - update)
        size = torch.maximum(self.norm, self.rows.value[:, _NORM])
        rounding = torch.where(self.plan.is_precise, 3e-7, 1e-2) * size
        other = torch.where(other > rounding + 1e-3 * update, other, 0.0 * other)
        return torch.where(self.steps == 1, other, math.nan)

    @cached_property
    def same(self) -> Tensor:
        """Whether all statistics of the parameter are those of the previous entry."""
        return _equal(self.value, self.rows.value)

    @cached_property
    def new_grad(self) -> Tensor:
        """Whether a statistic of the gradient is not that of the previous entry."""
        return ~_equal(self.grad, self.rows.grad)

    @cached_property
    def relative_grad(self) -> Tensor:
        """The norm of the gradient / the larger one of that of the parameter and of a new one."""
        return self.grad_norm / torch.maximum(self.norm, self.plan.usual_norm)

    @cached_property
    def stays(self) -> Tensor:
        """Whether the smallest and the largest element are those of the previous entry.

        [parameters, 2]; only of weights, and not in low precision, where equal numbers are common.
        """
        old = self.rows.value[:, _MIN : _MAX + 1]
        return (self.value[:, _MIN : _MAX + 1] == old) & self.plan.precise_weights[:, None]

    @cached_property
    def clamped(self) -> Tensor:
        """Whether the largest or smallest element stays at a bound while others change.

        An element that is never updated, such as that of a token that does not occur, may be the
        largest one, too. A bound is recognized if it is a number of up to three digits, or if the
        smallest and the largest elements are opposite. It is 0 if all elements have the same sign
        and other ones become 0. Elements that are masked have no gradient.
        """
        value = self.value[:, _MIN : _MAX + 1]
        is_bound = (self.stays & _is_short(value)).any(1)
        is_bound |= self.stays.all(1) & (value[:, 0] == -value[:, 1])
        new_zeros = self.value[:, _ZEROS] != self.rows.value[:, _ZEROS]
        is_bound |= (self.stays & (value == 0)).any(1) & new_zeros
        is_masked = self.grad[:, STAT["zero_fraction"]] > _MASKED
        return is_bound & (value[:, 1] > value[:, 0]) & ~self.same & ~is_masked

    @cached_property
    def oldest(self) -> Tensor:
        """The norms of the parameters in the first entry of the window, and its step."""
        at = (self.rows.numbers["entries"] % WINDOW).to(torch.int64)
        return self.rows.norms.gather(2, at[:, None, None].expand(-1, 2, 1))[:, :, 0]

    @cached_property
    def was_away(self) -> Tensor:
        """Whether the gradient has left its past before this entry."""
        return self.rows.numbers["onset"] > -math.inf

    @cached_property
    def outside(self) -> Tensor:
        """Whether the gradient is outside of its window of latest entries."""
        past, x = self.rows.grads, self.log_grad
        outside = (x > past.amax(1) + AWAY) | (x < past.amin(1) - AWAY)
        return outside & (self.rows.numbers["samples"] >= _MIN_SAMPLES) & self.is_finite


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """Return which rows of statistics are those of equal elements, as far as statistics can say."""
    return (a[:, _COMPARED] == b[:, _COMPARED]).all(1) & (a[:, _MEAN] == b[:, _MEAN])


def _is_short(x: Tensor) -> Tensor:
    """Return whether x, rounded to float32, is a decimal number of at most three digits."""
    unit = 10.0 ** (x.abs().log10().floor() - 2)
    return ((x / unit).round() * unit - x).abs() <= 6e-8 * x.abs()
