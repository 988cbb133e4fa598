"""The conditions of the whole model that a `Monitor` checks in every entry."""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor

from paramstats._core.format import number, one_line_name
from paramstats._findings.findings import Finding, FindingCode, Severity, Source
from paramstats._findings.over_time.accumulation import (
    accumulated,
    accumulated_part,
    is_early,
    line,
)
from paramstats._findings.over_time.conditions import RUN, SINCE, Rule
from paramstats._findings.over_time.entry import Now
from paramstats._findings.over_time.signals import SMALL_GRADIENT
from paramstats._findings.over_time.tracks import NAN, STAT, N
from paramstats._findings.structure import module_of

_SHRINKING = 0.01
"""All weights shrink if most lose more than this fraction of their norm per step."""

_LOST_UPDATES = 2e-6
"""Updates are lost if no weight in float16 or bfloat16 changes by more of its norm per step.

One step of a bfloat16 number is 2e-3 of it or more. In trainings that lost most of their updates,
norms of weights changed by at most 8e-7 per step, in healthy ones by 1e-3 or more.
"""


_MAX_ACCUMULATION = 20
"""Entries in a row without a change are usual if gradients grow: they may be added up."""


class Whole(enum.IntEnum):
    """A condition of the model; the position of its column in `Monitor`'s state."""

    NO_GRADIENT = 0
    NOTHING_CHANGES = 1
    ACCUMULATED = 2
    SHRINKING = 3
    LOST_UPDATES = 4
    ZERO_GRADIENTS = 5
    ACCUMULATED_PART = 6


WHOLE_RULES = {
    Whole.NO_GRADIENT: Rule(2, 1, 1),
    Whole.NOTHING_CHANGES: Rule(4, 16, 1),
    Whole.ACCUMULATED: Rule(3, 3, 3),
    Whole.SHRINKING: Rule(4, 9, 3),
    Whole.LOST_UPDATES: Rule(4, 9, 2),
    Whole.ZERO_GRADIENTS: Rule(4, 3, 1),
    Whole.ACCUMULATED_PART: Rule(3, 3, 3),
}


def whole_conditions(
    now: Now, first_step: int, reads_gradients: bool
) -> tuple[list[bool], list[bool]]:
    """Return whether each condition is true, and whether it is not; an entry may say neither.

    Args:
        now: the entry.
        first_step: the step of the first entry.
        reads_gradients: whether gradients were read, if there were any.
    """
    plan, rows = now.plan, now.rows
    known = (now.norm == now.norm) & (rows.value[:, 0] >= 0)
    trained = now.trained & known
    changed = known & ~now.same
    masks = [plan.trainable & (now.norm == now.norm), now.has_grad, changed, trained]
    masks += [trained & changed, trained & (now.grad_norm > 0), now.grad_norm == math.inf]
    masks += [trained & plan.weights, now.has_grad & (now.grad_norm != 0)]
    masks += [rows.numbers["not_zero"] > 0, now.grad_norm.isnan() & now.has_grad]
    counts = torch.stack(masks).sum(1).tolist()
    trainable, grads, changes, comparable, trained_changes, moving, *counts = counts
    infinite, weights, *nonzero, nans = counts
    # Without changes, gradients of several backward passes are added on purpose.
    accumulates = bool(comparable) and accumulated(now, trained, now.step - first_step)
    steps_are_few = is_early(now.step - first_step)
    yes = [
        bool(trainable and not grads and (changes or reads_gradients)),
        not trained_changes and 2 * moving > comparable and not (accumulates or infinite or nans),
        accumulates and 2 * trained_changes > comparable,
        bool(weights) and _shrinking(now, trained & plan.weights),
        bool(weights and trained_changes) and _loses_updates(now, trained),
        bool(grads and not any(nonzero)),
        not accumulates and steps_are_few and bool(accumulated_part(now)),
    ]
    known_now = [grads, trained_changes, comparable, weights, weights, grads, comparable]
    return yes, [bool(is_known) and not x for x, is_known in zip(yes, known_now, strict=True)]


def needed_of_whole(now: Now, state: Tensor) -> Tensor:
    """Return how many entries each condition must last, if that depends on the past."""
    needed = torch.zeros_like(state[:, :, RUN])
    # A sum of n gradients without a common direction is sqrt(n) times as large as one.
    growth = (now.log_grad - now.rows.grads.amin(1))[now.trained & now.is_finite]
    if len(growth) and float(growth.nanmedian()) > math.log(2):
        needed[:, Whole.NOTHING_CHANGES] = _MAX_ACCUMULATION
    return needed


def _shrinking(now: Now, use: Tensor) -> bool:
    """Return whether most weights shrink by more than `_SHRINKING` per step, as by a decay.

    A decay multiplies a weight by a factor: its range shrinks like its norm, whatever its gradient
    is. Gradients and clamps change both by different factors.
    """
    fallen, rate = _rates(now)
    shrinks = use & (rate < -_SHRINKING) & (fallen < -0.1)
    if not float(shrinks.sum()) > 0.8 * float(use.sum()):
        return False
    if float((now.hyperparameter("weight_decay")[use] == 0).sum()) > 0.5 * float(use.sum()):
        return False
    span, before = (x[:, STAT["max"]] - x[:, STAT["min"]] for x in (now.value, now.rows.value))
    factors = (span / before).log() / (now.norm / now.rows.value[:, STAT["norm"]]).log()
    return 0.6 < float(factors[shrinks].nanmedian()) < 1.6


def _loses_updates(now: Now, trained: Tensor) -> bool:
    """Return whether weights in low precision do not change, and some parameter not at all."""
    low = trained & ~now.plan.is_precise & (now.relative_grad > SMALL_GRADIENT)
    change = now.change[low & now.plan.weights]
    if not len(change) or not float(change.amax()) < _LOST_UPDATES:
        return False
    return bool((low & now.same & now.new_grad).any())


def _rates(now: Now) -> tuple[Tensor, Tensor]:
    """Return the change of the log norms of parameters within the window, and that per step."""
    norm, step = now.oldest.unbind(1)
    fallen = (now.norm / norm).log()
    return fallen, fallen / (now.step - step).clamp(min=1)


def make_whole_finding(condition: Whole, now: Now, state: Tensor, reads_gradients: bool) -> Finding:
    """Return the finding of a condition that begins.

    Args:
        condition: the condition.
        now: the entry.
        state: its row of the state of conditions.
        reads_gradients: whether gradients were read, if there were any.
    """
    since = int(state[SINCE])
    severity, value, threshold, name = Severity.WARNING, NAN, NAN, ""
    if condition is Whole.NO_GRADIENT:
        code = FindingCode.MISSING_GRADIENT
        message = f"no parameter has a gradient since step {since}"
        advice = (
            "Gradients are gone when the summary is taken. Call watcher.step() after backward and "
            "before zero_grad(), or pass optimizer= to watch. If a gradient is missing in the "
            "optimizer's step as well, nothing is learned: check that the loss depends on this "
            "model."
        )
        if not reads_gradients:
            severity = Severity.INFO
            advice += " With grads=False, this is expected."
    elif condition is Whole.NOTHING_CHANGES:
        code = FindingCode.UNCHANGED_PARAMETER
        message = f"no parameter changes since step {since}, although gradients are not zero"
        advice = (
            "optimizer.step() is missing, or the learning rate is 0, or the optimizer has other "
            "tensors than this model (it was created before the model was moved, wrapped or "
            "copied), or a gradient scaler skips all steps."
        )
        if bool((now.hyperparameter("lr")[now.trained] == 0).all()):
            message += "; the learning rate is 0"
            advice = "Nothing is learned any more. Check the learning rate and its schedule."
        elif float(now.rows.numbers["entries"].amax()) > float(state[RUN]) + 1:
            severity = Severity.INFO
            advice = f"With gradient accumulation, this is expected. Otherwise: {advice}"
    elif condition is Whole.ZERO_GRADIENTS:
        code, value = FindingCode.ZERO_GRADIENT, 1.0
        message = f"all gradients have been exactly zero since step {since}"
        advice = (
            "The loss does not depend on the parameters: check that it is not constant, masked or "
            "underflowing."
        )
        if now.updates is None:  # otherwise gradients are read in the optimizer's step
            advice = (
                "watcher.step() was probably called after zero_grad(). Call it after backward and "
                f"before zero_grad(). Otherwise, {advice[0].lower()}{advice[1:]}"
            )
    elif condition is Whole.ACCUMULATED_PART:
        rows = accumulated_part(now)
        code = FindingCode.ACCUMULATED_GRADIENT
        slope, start, _ = line(now)
        row, value = rows[0], float(slope[rows].median())
        name = now.plan.names[row]
        message = (
            f"norms of the gradients of {one_line_name(module_of(name))} alone grow like "
            f"step^{value:.2f}, from {number(math.exp(float(start[row])))} to "
            f"{number(float(now.grad_norm[row]))}, without the noise of batches that others have"
        )
        advice = (
            "Each backward adds to the gradients of all steps before. Call zero_grad() of the "
            "optimizer of these parameters, too, after each of its steps."
        )
    elif condition is Whole.ACCUMULATED:
        slope, start, _ = line(now)
        use = now.plan.trainable & now.has_grad & (now.rows.sums[:, N] >= 5)
        value, code = float(slope[use].median()), FindingCode.ACCUMULATED_GRADIENT
        largest = int(torch.where(use, start, -math.inf).argmax())
        norm = float(now.grad[largest, STAT["norm"]])
        first = math.exp(float(start[largest]))
        message = (
            f"norms of all gradients grow like step^{value:.2f}, such as that of "
            f"{one_line_name(now.plan.names[largest])} from {number(first)} to {number(norm)}"
        )
        advice = (
            "Each backward adds to the gradients of all steps before. Call optimizer.zero_grad() "
            "after each optimizer step."
        )
    elif condition is Whole.LOST_UPDATES:
        code, threshold = FindingCode.LOST_UPDATE, _LOST_UPDATES
        value = float(now.change[now.plan.weights & ~now.plan.is_precise].nan_to_num(0.0).amax())
        message = f"no weight in low precision changes by more than {number(value)} per step"
        advice = (
            "The updates are smaller than the dtype can add to the weights, so rounding removes "
            "them. Keep the weights in float32 and use torch.autocast, use an optimizer with "
            "float32 master weights or stochastic rounding, or raise the learning rate."
        )
    else:
        rate = float(_rates(now)[1][now.plan.weights].nanmedian())
        value, threshold, code = -rate, _SHRINKING, FindingCode.SHRINKING_WEIGHT
        message = f"norms of most weights fall by {100 * -rate:.3g}% per step, median"
        advice = (
            "Weights are driven towards zero. Lower the weight decay: learning rate x weight decay "
            "is the share that each step removes."
        )
    source: Source = "grad" if "GRADIENT" in code.name else "param"
    return Finding(severity, code, name, source, value, threshold, message, advice, step=since)
