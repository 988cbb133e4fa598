"""The conditions of the whole model that a `Monitor` checks in every entry."""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor

from paramstats._core.format import number
from paramstats._findings.findings import Finding, FindingCode, Severity
from paramstats._findings.over_time.conditions import SINCE, Rule
from paramstats._findings.over_time.signals import Now
from paramstats._findings.over_time.tracks import NAN, STAT, float64

_MAX_STEPS = 200
"""Steps from the first entry in which gradients are checked for growth in proportion to the step."""

_SHRINKING = 0.01
"""All weights shrink if most lose more than this fraction of their norm per step."""


class Whole(enum.IntEnum):
    """A condition of the model; the position of its column in `Monitor`'s state."""

    NO_GRADIENT = 0
    NOTHING_CHANGES = 1
    ACCUMULATED = 2
    SHRINKING = 3


WHOLE_RULES = {
    Whole.NO_GRADIENT: Rule(2, 1, 1),
    Whole.NOTHING_CHANGES: Rule(20, 20, 1),
    Whole.ACCUMULATED: Rule(3, 3, 3),
    Whole.SHRINKING: Rule(4, 9, 3),
}


def add_to_line(now: Now) -> None:
    """Add the entry to the sums for the line through log norms of gradients by log of the step."""
    numbers, y = now.rows.numbers, now.log_grad
    steps = now.step - numbers["first_step"].nan_to_num(now.step)
    use = (y == y) & (steps <= _MAX_STEPS)
    x = torch.where(use, (steps + 1).clamp(min=1).log(), 0.0)
    y = torch.where(use, y, 0.0)
    for name, term in zip("n x y xx xy yy".split(), (use, x, y, x * x, x * y, y * y), strict=True):
        numbers[name] = numbers[name] + term


def whole_conditions(now: Now) -> list[float]:
    """Return each condition: 1 or 0, and NaN where the entry does not say."""
    plan, rows = now.plan, now.rows
    trained = plan.trainable & now.has_grad
    read = now.norm == now.norm
    known = read & (rows.before[:, 0, 0] >= 0)
    changed = known & ~now.same
    counts = torch.stack(
        [
            plan.trainable & read,
            now.has_grad,
            changed,
            trained & known & (now.steps > 0),
            trained & changed,
            trained & known & (now.grad[:, 1:9] != rows.before[:, 1, 1:9]).any(1),
            trained & plan.weights & known,
        ]
    ).sum(1)
    trainable, grads, changes, comparable, trained_changes, new_grads, weights = counts.tolist()
    no_gradient = 0.0 if grads else (1.0 if trainable and changes else NAN)
    nothing = NAN
    if comparable:
        nothing = 0.0 if trained_changes else (1.0 if 2 * new_grads > comparable else NAN)
    accumulated = _accumulated(now, trained) if grads else NAN
    shrinking = _shrinking(now, trained & plan.weights & known) if weights else NAN
    return [no_gradient, nothing, accumulated, shrinking]


def line(now: Now) -> tuple[Tensor, Tensor, Tensor]:
    """Return the exponent of growth of each gradient's norm, the norm at its start, and the error.

    The exponent is 1 for a norm that is proportional to the number of steps. The error is the root
    mean square of the deviations of the log norms from the line.
    """
    n, x, y, xx, xy, yy = (now.rows.numbers[name] for name in "n x y xx xy yy".split())
    centered = xy - x * y / n
    slope = centered / (xx - x * x / n)
    error = ((yy - y * y / n - slope * centered) / n).clamp(min=0).sqrt()
    return slope, (y - slope * x) / n, error


def _accumulated(now: Now, trained: Tensor) -> float:
    """Return whether all gradients grow in proportion to the step.

    Exponential growth, as when a plateau is left, does not fit to the line. Gradients that are
    behind a weight that starts at zero do, but that of this weight does not grow.
    """
    steps = float((now.step - now.rows.numbers["first_step"]).nan_to_num(0.0).amax())
    if not 10 <= steps <= _MAX_STEPS:
        return NAN
    use = trained & (now.rows.numbers["n"] >= 5)
    slope, start, error = (x[use] for x in line(now))
    if not len(slope):
        return NAN
    grows = (slope > 0.5) & (slope < 1.6)
    largest = int(start.argmax())
    is_most = float(grows.to(torch.float64).mean()) >= 0.95 and bool(grows[largest])
    return float(is_most and 0.7 < float(slope.median()) < 1.4 and float(error.median()) < 0.3)


def _shrinking(now: Now, use: Tensor) -> float:
    """Return whether most weights shrink by more than `_SHRINKING` per step."""
    fallen, rate = _rates(now)
    shrinks = (rate[use] < -_SHRINKING) & (fallen[use] < -0.1)
    return float(float(shrinks.to(torch.float64).mean()) > 0.8)


def _rates(now: Now) -> tuple[Tensor, Tensor]:
    """Return the change of the log norms of parameters within the window, and that per step."""
    old = now.rows.window[:, 1:, 0]
    fallen = now.norm.log() - old[:, 0]
    return fallen, fallen / (now.step - old[:, 1]).clamp(min=1)


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
        message = f"no parameter has a gradient since step {since}, and parameters change"
        advice = (
            "Gradients are gone when the summary is taken. Call watcher.step() after backward and "
            "before zero_grad(), or pass optimizer= to watch."
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
    elif condition is Whole.ACCUMULATED:
        slope, start, _ = line(now)
        use = now.plan.trainable & now.has_grad & (now.rows.numbers["n"] >= 5)
        value, code = float(slope[use].median()), FindingCode.ACCUMULATED_GRADIENT
        largest = int(torch.where(use, start, -math.inf).argmax())
        norm = float(now.grad[largest, STAT["norm"]])
        first = math.exp(float(start[largest]))
        message = (
            f"norms of all gradients grow like step^{value:.2f}, such as that of "
            f"{now.plan.names[largest]} from {number(first)} to {number(norm)}"
        )
        advice = (
            "Each backward adds to the gradients of all steps before. Call optimizer.zero_grad() "
            "after each optimizer step."
        )
    else:
        fallen, rate = (float(x[now.plan.weights].nanmedian()) for x in _rates(now))
        value, threshold, code = -rate, _SHRINKING, FindingCode.SHRINKING_WEIGHT
        message = f"norms of most weights fall by {100 * -rate:.3g}% per step, median"
        advice = (
            "Weights are driven towards zero. Lower the weight decay: learning rate x weight decay "
            "is the share that each step removes."
        )
    return Finding(severity, code, "", "param", value, threshold, message, advice, step=since)


def row_of(values: list[float]) -> Tensor:
    return float64(values)[None]
