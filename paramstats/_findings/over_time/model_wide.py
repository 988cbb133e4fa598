"""The conditions of the whole model that a `Monitor` checks in every entry."""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor

from paramstats._core.format import number, one_line_name
from paramstats._findings.findings import Finding, FindingCode, Severity, Source
from paramstats._findings.over_time.conditions import RUN, SINCE, Rule
from paramstats._findings.over_time.entry import Now
from paramstats._findings.over_time.signals import SMALL_GRADIENT
from paramstats._findings.over_time.tracks import NAN, STAT, N

_MAX_STEPS = 200
"""Steps after the first entry in which gradients may be found to grow like their number."""

_SHRINKING = 0.01
"""All weights shrink if most lose more than this fraction of their norm per step."""

_LOST_UPDATES = 2e-6
"""Updates are lost if no weight in float16 or bfloat16 changes by more of its norm per step.

One step of a bfloat16 number is 2e-3 of it or more. In trainings that lost most of their updates,
norms of weights changed by at most 8e-7 per step, in healthy ones by 1e-3 or more.
"""


class Whole(enum.IntEnum):
    """A condition of the model; the position of its column in `Monitor`'s state."""

    NO_GRADIENT = 0
    NOTHING_CHANGES = 1
    ACCUMULATED = 2
    SHRINKING = 3
    LOST_UPDATES = 4
    ZERO_GRADIENTS = 5


WHOLE_RULES = {
    Whole.NO_GRADIENT: Rule(2, 1, 1),
    Whole.NOTHING_CHANGES: Rule(20, 20, 1),
    Whole.ACCUMULATED: Rule(3, 3, 3),
    Whole.SHRINKING: Rule(4, 9, 3),
    Whole.LOST_UPDATES: Rule(4, 9, 2),
    Whole.ZERO_GRADIENTS: Rule(4, 3, 1),
}


def add_to_line(now: Now, first_step: int) -> bool:
    """Add the entry to the sums for the line through log norms of gradients by log of the step.

    Returns whether it was early enough for that.
    """
    steps = now.step - first_step
    if steps > _MAX_STEPS:
        return False
    x = math.log(steps + 1)
    use = now.is_finite.to(torch.float64)
    y = now.log_grad.where(now.is_finite, use)  # 0 where it is not finite
    terms = (use, x * use, y, x * x * use, x * y, y * y)
    now.rows.sums = now.rows.sums + torch.stack(terms, 1)
    return True


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
    masks += [trained & changed, trained & now.new_grad & (now.grad_norm < math.inf)]
    masks += [trained & plan.weights, now.has_grad & (now.grad_norm != 0)]
    masks += [rows.numbers["not_zero"] > 0]
    counts = torch.stack(masks).sum(1).tolist()
    trainable, grads, changes, comparable, trained_changes, new_grads, weights, *nonzero = counts
    # Without changes, gradients of several backward passes are added on purpose.
    accumulates = bool(comparable) and _accumulated(now, trained, now.step - first_step)
    yes = [
        bool(trainable and not grads and (changes or reads_gradients)),
        not trained_changes and 2 * new_grads > comparable and not accumulates,
        accumulates and 2 * trained_changes > comparable,
        bool(weights) and _shrinking(now, trained & plan.weights),
        bool(weights and trained_changes) and _loses_updates(now, trained),
        bool(grads and not any(nonzero)),
    ]
    known_now = [grads, trained_changes, comparable, weights, weights, grads]
    return yes, [bool(is_known) and not x for x, is_known in zip(yes, known_now, strict=True)]


def line(now: Now) -> tuple[Tensor, Tensor, Tensor]:
    """Return the exponent of growth of each gradient's norm, the norm at its start, and the error.

    The exponent is 1 for a norm that is proportional to the number of steps. The error is the root
    mean square of the deviations of the log norms from the line.
    """
    n, x, y, xx, xy, yy = now.rows.sums.unbind(1)
    centered = xy - x * y / n
    slope = centered / (xx - x * x / n)
    error = ((yy - y * y / n - slope * centered) / n).clamp(min=0).sqrt()
    return slope, (y - slope * x) / n, error


def _accumulated(now: Now, trained: Tensor, steps: float) -> bool:
    """Return whether all gradients grow in proportion to the step.

    Exponential growth, as when a plateau is left, does not fit to the line. Gradients that are
    behind a weight that starts at zero do, but that of this weight does not grow.
    """
    if not 10 <= steps <= _MAX_STEPS:
        return False
    use = trained & (now.rows.sums[:, N] >= 5) & (now.relative_grad > SMALL_GRADIENT)
    slope, start, error = (x[use] for x in line(now))
    if not len(slope):
        return False
    grows = float((slope > 0.35).to(torch.float64).mean()) >= 0.9
    return bool(
        grows
        and slope[int(start.argmax())] > 0.45
        and 0.55 < float(slope.median()) < 1.4
        and float(error.median()) < 0.15
    )


def _shrinking(now: Now, use: Tensor) -> bool:
    """Return whether most weights shrink by more than `_SHRINKING` per step."""
    fallen, rate = _rates(now)
    shrinks = use & (rate < -_SHRINKING) & (fallen < -0.1)
    return float(shrinks.sum()) > 0.8 * float(use.sum())


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
    severity, value, threshold = Severity.WARNING, NAN, NAN
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
        message = f"no parameter changes since step {since}, although gradients do"
        advice = (
            "The optimizer makes no steps, or its learning rate is 0, or it has other parameters "
            "than this model (created before the model was moved or wrapped), or a gradient scaler "
            "skips all steps."
        )
        if float(now.rows.numbers["entries"].amax()) > float(state[RUN]) + 1:
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
    return Finding(severity, code, "", source, value, threshold, message, advice, step=since)
