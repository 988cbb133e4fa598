"""Rules about optimizers: the last update and Adam's state, known with `optimizer=...`.

The size of an update is compared with a weight only, as `is_weight` defines it. A bias may start at
zero, and the key bias of attention is moved by rounding errors alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from paramstats._core import moments
from paramstats._core.entries import Entry
from paramstats._core.format import dtype_name, number
from paramstats._core.moments import Moments, Statistics
from paramstats._core.optimizer_record import OptimizerRecord
from paramstats._core.optimizers import VARIANCES
from paramstats._core.updates import LAG, ROWS, root_mean
from paramstats._findings.context import Context
from paramstats._findings.findings import Finding, FindingCode, Severity
from paramstats._findings.structure import Part, parts_of, usual_norm

_SMALL_STEP = 0.1
"""Adam's steps are not large, whatever a new weight is, if they are this fraction of the weight."""

_NORMAL_GRADIENT = 1e-5
"""A gradient of more than this fraction of its weight is not below eps because it vanished."""

_REPLACED = 0.5
"""A step replaces the weight if its norm is this fraction of that of the new weight."""


def forgotten_parameters(context: Context) -> Iterator[Finding]:
    """Report parameters with a gradient that no optimizer has, if optimizers have others."""
    optimizer = context.record.optimizer
    if optimizer is None or all(numbers is None for numbers in optimizer.hyperparameters):
        return
    trainable = [
        (entry, numbers is None)
        for entry, numbers in zip(context.entries, optimizer.hyperparameters, strict=True)
        if entry.requires_grad and entry.grad is not None
    ]
    forgotten = [entry for entry, is_forgotten in trainable if is_forgotten]
    is_most = 2 * len(forgotten) > len(trainable)
    # Then it is likely on purpose, as when only the last layer is trained.
    severity = Severity.INFO if is_most else Severity.WARNING
    code, nan = FindingCode.FORGOTTEN_PARAMETER, math.nan
    message = "has a gradient, is in no optimizer"
    advice = (
        "The parameter never changes. Add it to the optimizer, pass all optimizers to paramstats, "
        "or freeze it with requires_grad_(False), which saves the time of its gradient."
    )
    for entry in forgotten:
        yield Finding(severity, code, entry.name, "param", nan, nan, message, advice)


def large_updates(context: Context) -> Iterator[Finding]:
    """Report updates that are large compared with their weight and with a usual initialization.

    A weight that starts at zero is as large as its first update, so the weight alone is no measure.
    Later, a weight has grown with its updates. Adam moves an element by up to the learning rate, so
    that is compared as well. Its steps keep their size, while those of other optimizers shrink with
    the gradient: there, a large step of a single weight is no warning, unless it replaces it.
    """
    limit = context.thresholds.largest_update_ratio
    code = FindingCode.LARGE_UPDATE
    advice = "A step replaces a large part of the weight. Lower the learning rate."
    usual = " A usual learning rate of AdamW is 1e-3 for small models and 1e-4 for large ones."
    found, n = [], 0
    for step in _steps(context):
        n += 1
        weight, norm, new_norm = step.entry.value, step.update.norm, step.part.usual_norm
        if not weight.norm < math.inf or "history_size" in step.hyperparameters:
            continue  # LBFGS makes several steps in one
        ratio, message = norm / max(weight.norm, new_norm), ""
        if ratio > limit:
            of = "the weight" if weight.norm >= new_norm else "a new weight of this shape"
            message = (
                f"one step changed it by a norm of {number(norm)}, {number(ratio)} times that of "
                f"{of}{step.lr_in_words()}"
            )
        elif _SMALL_STEP * weight.rms < step.lr and step.is_adam():
            std = new_norm / math.sqrt(weight.count)
            ratio = step.lr / std
            message = (
                f"lr {number(step.lr)}: each step moves an element by up to that; elements are "
                f"about {number(weight.rms)}, those of a new weight {number(std)}"
            )
        if ratio > limit:
            found.append((step, ratio, message))
    is_global = 3 * len(found) >= n
    for step, ratio, message in found:
        is_adam = step.is_adam()
        is_warning = is_adam or is_global or ratio > _REPLACED
        severity = Severity.WARNING if is_warning else Severity.INFO
        text, name = advice + usual * is_adam, step.entry.name
        yield Finding(severity, code, name, "update", ratio, limit, message, text)


def lost_updates(context: Context) -> Iterator[Finding]:
    """Report weights most of whose elements have a gradient and do not change.

    It is a warning if most elements of all weights are lost. A single weight may have converged. In
    float32, it is one if no weight keeps its updates: layers behind a tiny gate have small ones.
    """
    limit = context.thresholds.lost_updates
    lost = [(step, share) for step in _steps(context) if (share := _lost(step)) is not None]
    total = sum(_with_gradient(step) for step, _ in lost)
    is_most = sum(share * _with_gradient(step) for step, share in lost) > limit * total
    is_every = all(share > limit for _, share in lost)
    for step, share in lost:
        if not share > limit:
            continue
        is_precise = torch.finfo(step.entry.dtype).bits >= 32
        severity = Severity.WARNING if (is_every if is_precise else is_most) else Severity.INFO
        if is_precise:
            advice = (
                "The updates are so small that rounding removes them. Raise the learning rate, use "
                "Adam, which rescales small gradients, or check why the gradients are so small."
            )
        else:
            advice = (
                "The updates are smaller than the dtype can add to the weight, so rounding removes "
                "them. Keep the weights in float32 and use torch.autocast, use an optimizer with "
                "float32 master weights or stochastic rounding, or raise the learning rate."
            )
        if step.lr < 0.1 * step.hyperparameters.get("initial_lr", math.nan):
            severity = Severity.INFO
            advice = f"The scheduler has lowered the learning rate. {advice}"
        dtype, name = dtype_name(step.entry.dtype), step.entry.name
        what = f"elements with a gradient did not change, {dtype}{step.lr_in_words()}"
        message = f"{100 * share:.4g}% of the {what}"
        code = FindingCode.LOST_UPDATE
        yield Finding(severity, code, name, "update", share, limit, message, advice)


def adam_state(context: Context) -> Iterator[Finding]:
    """Report weights whose gradients outgrow Adam's second moment, or are below Adam's eps."""
    limits, optimizer = context.thresholds, context.record.optimizer
    if optimizer is None:
        return
    n, is_below = 0, []
    lags = optimizer.column_states(LAG)
    for part in parts_of(context.record.layout):
        row, lag = part.row, lags[part.row]
        if not lag[0] > 0 or moments.is_unread(lag):
            continue
        lag, entry = Moments._make(lag), context.entries[row]
        n += 1
        rms = root_mean(lag, context.record.grad_scale)
        if rms > limits.largest_lag:
            code, limit = FindingCode.LAGGING_VARIANCE, limits.largest_lag
            message = f"gradients are {number(rms)} times the root of the second moment"
            advice = (
                "Gradients have grown faster than Adam's second moment, so the steps are too "
                "large, which often precedes a spike of the loss. Clip gradients, lower beta2 or "
                "the learning rate if the loss spikes."
            )
            name = entry.name
            yield Finding(Severity.INFO, code, name, "grad", rms, limit, message, advice)
        if not lag.zeros > limits.below_eps * lag.count:
            continue
        never = _never_had_gradient(optimizer, row)
        below = (lag.zeros / lag.count - never) / (1 - never) if never < 1 else 0.0
        if below > limits.below_eps:
            is_below.append((entry, below, optimizer.hyperparameters[row] or {}))
    yield from _below_eps(context, is_below, n)


def _below_eps(
    context: Context, below: Sequence[tuple[Entry, float, Mapping[str, float]]], n: int
) -> Iterator[Finding]:
    """Report weights whose gradients are below Adam's eps.

    The steps are then lr x gradient / eps. It is a warning if gradients are normal and eps stops
    all weights.

    Args:
        context: the context.
        below: the weights, the share of their elements, and their hyperparameters.
        n: the number of weights with a second moment.
    """
    found, stopped = [], 0
    limits, code = context.thresholds, FindingCode.BELOW_EPS
    for entry, share, numbers in below:
        assert entry.shape is not None and entry.grad is not None  # as of every weight with a lag
        eps, lr = (numbers.get(key, math.nan) for key in ("eps", "lr"))
        scale = max(entry.value.norm, usual_norm(entry.shape))
        gradient = entry.grad.norm / scale
        message = f"{100 * share:.4g}% of the elements below eps {number(eps)}"
        advice = (
            "Gradients are smaller than Adam's eps, which makes the updates smaller. Check for "
            "vanishing gradients and a loss that is scaled down; otherwise lower eps. At the end "
            "of a training, this is expected."
        )
        if gradient > _NORMAL_GRADIENT:
            step = lr * gradient / eps
            usual = lr * math.sqrt(entry.value.count) / scale
            stopped += step < limits.smallest_update and usual > 10 * limits.smallest_update
            message += (
                f"; the gradient is normal, {number(gradient)} times the weight, and lr x gradient "
                f"/ eps {number(step)} times the weight"
            )
            advice = (
                "Adam's eps is too large for these gradients: it divides them by eps instead of "
                "their own size, so the steps are small. Lower eps; its default is 1e-8."
            )
        found.append((entry.name, share, message, advice))
    severity = Severity.WARNING if stopped == n else Severity.INFO
    for name, share, message, advice in found:
        yield Finding(severity, code, name, "grad", share, limits.below_eps, message, advice)


class _Step(NamedTuple):
    """The last update of a weight."""

    part: Part
    entry: Entry
    update: Statistics
    optimizer: OptimizerRecord

    @property
    def row(self) -> int:
        return self.part.row

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        return self.optimizer.hyperparameters[self.row] or {}

    @property
    def lr(self) -> float:
        """The learning rate; NaN if it is not known."""
        return self.hyperparameters.get("lr", math.nan)

    def lr_in_words(self) -> str:
        return f", lr {number(self.lr)}" if self.lr >= 0 else ""

    def is_adam(self) -> bool:
        """Return whether it is the update of `torch.optim.Adam` or AdamW, and eps is small."""
        lag = self.optimizer.state(LAG, self.row)
        return self.optimizer.methods[self.row] == "formula" and 2 * lag.zeros < lag.count


def _steps(context: Context) -> Iterator[_Step]:
    """Yield the update of every weight whose update is known and finite."""
    optimizer = context.record.optimizer
    if optimizer is not None:
        for part in parts_of(context.record.layout):
            update = context.updates[part.row]
            if update is not None and not update.nonfinite_count:
                yield _Step(part, context.entries[part.row], update, optimizer)


def _with_gradient(step: _Step) -> float:
    """Return the number of elements whose gradient is not zero."""
    grad = step.entry.grad
    return 0.0 if grad is None else grad.count - grad.zero_count


def _lost(step: _Step) -> float | None:
    """Return the share of the elements with a gradient that did not change.

    None if there are none, or if they are not lost.
    """
    grad = step.entry.grad
    if grad is None or grad.nonfinite_count or not _with_gradient(step) or step.lr == 0:
        return None
    if _keeps_precision(step):
        return None
    return max(0.0, step.update.zero_count - grad.zero_count) / _with_gradient(step)


def _keeps_precision(step: _Step) -> bool:
    """Return whether unchanged elements of a low-precision weight are no lost updates.

    True if the optimizer rounds stochastically, or if its state has the weight in a higher
    precision or the rounding errors (Kahan summation: "kahan_comp", "compensation").
    """
    dtype, optimizer, row = torch.finfo(step.entry.dtype), step.optimizer, step.row
    if dtype.bits >= 32 or optimizer.methods[row] == "formula":  # torch.optim does neither
        return False
    weight, update = step.entry.value, step.update
    for column, key in enumerate(optimizer.keys, len(ROWS)):
        state = optimizer.state(column, row)
        if state.count == update.count and (
            "comp" in key or math.isclose(_rms(state), weight.rms, rel_tol=0.01)
        ):
            return True
    # Rounding to nearest lets only those elements change that are far smaller than the others,
    # and by little. Stochastic rounding changes elements of all sizes, by the dtype's steps.
    changed = update.count - update.zero_count
    return bool(changed and update.norm / math.sqrt(changed) > 0.25 * dtype.eps * weight.rms)


def _rms(state: Moments) -> float:
    return math.hypot(math.sqrt(state.m2 / state.count), state.mean) if state.count > 0 else 0.0


def _never_had_gradient(optimizer: OptimizerRecord, row: int) -> float:
    """Return the share of elements whose second moment is zero, such as rows of an embedding."""
    for key in VARIANCES:
        column = optimizer.column(key)
        if column is not None and optimizer.has(column, row):
            variance = optimizer.state(column, row)
            return variance.zeros / variance.count if variance.count else 0.0
    return 0.0
