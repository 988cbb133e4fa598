"""The findings over time in words: code, severity, evidence and advice of every condition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from paramstats._core.format import number
from paramstats._findings.findings import Finding, FindingCode, Severity, Source
from paramstats._findings.over_time.conditions import RUN, SINCE
from paramstats._findings.over_time.entry import Now
from paramstats._findings.over_time.signals import Condition
from paramstats._findings.over_time.tracks import STAT
from paramstats._findings.thresholds import Thresholds

_NORM = STAT["norm"]


class Evidence(NamedTuple):
    """What a condition found in one parameter."""

    value: float
    threshold: float
    message: str
    advice: str = ""
    """What it means and what to do, if that is not `Text.advice`."""


class Text(NamedTuple):
    """What is the same for all parameters."""

    code: FindingCode
    source: Source
    advice: str
    evidence: Callable[[Now, int, Thresholds], Evidence]
    wide: str
    """What it means if it is true of most parameters; "" if that is the same."""


def make_finding(condition: Condition, now: Now, row: int, limits: Thresholds) -> Finding:
    """Return the finding of a condition that begins."""
    text, nan = TEXTS[condition], math.nan
    value, threshold, message, advice = text.evidence(now, row, limits)
    severity = Severity.INFO if condition is Condition.OUTSIDE else Severity.WARNING
    is_usual = now.plan.weights[row] | now.plan.is_precise[row]
    if condition is Condition.UNCHANGED and not bool(is_usual):
        severity = Severity.INFO  # such as ones in bfloat16, which change by steps of 0.004 only
    if advice is _NO_DECAY:
        severity = Severity.INFO
    return Finding(
        severity,
        text.code,
        now.plan.names[row],
        text.source,
        nan if value != value else value,
        threshold,
        message,
        advice or text.advice,
        step=_begin(condition, now, row),
    )


def _begin(condition: Condition, now: Now, row: int) -> int:
    if condition in (Condition.SPIKE, Condition.COLLAPSE):
        return int(now.rows.numbers["onset"][row])
    return int(now.rows.conditions[row, condition, SINCE])


def _lasting(condition: Condition, now: Now, row: int) -> str:
    since, run = now.rows.conditions[row, condition, [SINCE, RUN]].tolist()
    return f"in {run:.0f} entries since step {since:.0f}"


def _unchanged(now: Now, row: int, limits: Thresholds) -> Evidence:
    relative = float(now.relative_grad[row])
    message = (
        f"all statistics equal {_lasting(Condition.UNCHANGED, now, row)}, while others change; "
        f"gradient norm {number(float(now.grad[row, _NORM]))}"
    )
    if relative < math.inf:
        message += f", {number(relative)} times the weight"
    return Evidence(0.0, 0.0, message)


def _large(now: Now, row: int, limits: Thresholds) -> Evidence:
    steps = int(now.steps[row])
    ratio = float(now.change[row])
    per = "" if steps == 1 else f" per step, on average of {steps} steps"
    before = float(now.rows.value[row, _NORM])
    message = (
        f"changed by at least {number(ratio)} times its norm{per}; norm {number(before)} -> "
        f"{number(float(now.norm[row]))}"
    )
    if now.updates is not None and float(now.other_change[row]) > 0:
        message += f"; norm of the optimizer's update {number(float(now.updates[row, _NORM]))}"
        return Evidence(ratio, limits.largest_change, message, _NOT_BY_THE_OPTIMIZER)
    return Evidence(ratio, limits.largest_change, message)


def _outside(now: Now, row: int, limits: Thresholds) -> Evidence:
    assert now.updates is not None
    change, norm = float(now.other_change[row]), float(now.norm[row])
    message = (
        f"changed by a norm of at least {number(change)} besides the optimizer's update, whose "
        f"norm is {number(float(now.updates[row, _NORM]))}; norm of the parameter {number(norm)}"
    )
    return Evidence(change / norm if norm else math.inf, math.nan, message)


def _grown(now: Now, row: int, limits: Thresholds) -> Evidence:
    norm, first = float(now.norm[row]), float(now.rows.numbers["first_norm"][row])
    usual = max(first, float(now.plan.usual_norm[row]))
    what = "its first norm" if usual == first else "that of a new weight of this shape"
    message = f"norm {number(first)} -> {number(norm)}, {number(norm / usual)} times {what}"
    return Evidence(norm / usual, limits.weight_growth, message)


def _shrunk(now: Now, row: int, limits: Thresholds) -> Evidence:
    norm, first = float(now.norm[row]), float(now.rows.numbers["first_norm"][row])
    message = f"norm {number(first)} -> {number(norm)}, {number(norm / first)} times the first"
    advice = ""
    if _is_jump(now, row):
        advice = _JUMP
    elif _has_no_decay(now, row):
        advice = _NO_DECAY
    return Evidence(norm / first, limits.weight_collapse, message, advice)


def _is_jump(now: Now, row: int) -> bool:
    """Return whether the norm has fallen mostly between two entries of the window."""
    norms, steps = now.rows.norms[row]
    norms = torch.cat((norms[steps.argsort(stable=True)], now.norm[row : row + 1])).log()
    return bool(norms.diff().amin() < 0.7 * (norms[-1] - norms.amax()))


def _has_no_decay(now: Now, row: int) -> bool:
    return float(now.hyperparameter("weight_decay")[row]) == 0


def _clamped(now: Now, row: int, limits: Thresholds) -> Evidence:
    low, high = float(now.value[row, STAT["min"]]), float(now.value[row, STAT["max"]])
    before = now.rows.value[row]
    bounds = [
        f"{name} {number(x)}"
        for name, x in (("min", low), ("max", high))
        if x == float(before[STAT[name]])
    ]
    lasting = _lasting(Condition.CLAMPED, now, row)
    message = f"{' and '.join(bounds)} constant {lasting}, while the norm changes"
    return Evidence(max(abs(low), abs(high)), math.nan, message)


def _moved(now: Now, row: int, limit: float) -> Evidence:
    past = float(now.rows.numbers["past"][row])
    norm, ratio = float(now.grad[row, _NORM]), math.exp(min(700.0, float(now.log_grad[row]) - past))
    message = (
        f"norm {number(norm)}, {number(ratio)} times the median of its latest entries "
        f"({number(math.exp(past))})"
    )
    return Evidence(ratio, limit, message)


def _zero(now: Now, row: int, limits: Thresholds) -> Evidence:
    message = f"all elements zero {_lasting(Condition.ZERO, now, row)}"
    has_had = float(now.rows.numbers["not_zero"][row]) > 0
    return Evidence(1.0, 1.0, message, "" if has_had else _NEVER)


def _lost(now: Now, row: int, limits: Thresholds) -> Evidence:
    had, of = (float(now.rows.numbers[name][row]) for name in ("with_grad", "entries"))
    of -= float(now.rows.conditions[row, Condition.LOST, RUN]) - 1  # without those of the gap
    message = (
        f"none {_lasting(Condition.LOST, now, row)}; {had:.0f} of {of:.0f} earlier ones had one"
    )
    return Evidence(math.nan, math.nan, message)


def _small(now: Now, row: int, limits: Thresholds) -> Evidence:
    assert now.update is not None
    ratio = float(now.update[row])
    lasting = _lasting(Condition.SMALL, now, row)
    if float(now.hyperparameter("lr")[row]) == 0:
        message = f"the learning rate of this parameter is 0; no change {lasting}"
        return Evidence(ratio, limits.smallest_update, message, _LR_ZERO)
    if not ratio:
        message = f"the update is exactly 0 {lasting}"
        return Evidence(ratio, limits.smallest_update, message, _NO_UPDATE)
    message = f"update norm {number(ratio)} times that of the weight {lasting}"
    return Evidence(ratio, limits.smallest_update, message)


_TOO_SMALL = (
    "The steps are so small that the weight needs about a million of them to change. Raise the "
    "learning rate and check its schedule. With plain SGD, check why gradients are small."
)

_NEVER = (
    "No gradient has reached this weight yet. Check what follows it for a factor of 0, dead ReLUs "
    "or masks. An expert may get no tokens: balance the router."
)
_LR_ZERO = (
    "Check the learning rate of its parameter group, and the schedule. If it is not trained on "
    "purpose, requires_grad_(False) saves the time of its gradient."
)
_NO_UPDATE = (
    "The steps are so small that rounding removes them. Raise the learning rate and check its "
    "schedule."
)

_TOO_LARGE = (
    "The learning rate is too high, or the step was too large: the weight is replaced instead of "
    "adjusted. Lower the learning rate, warm it up, or clip gradients."
)

_JUMP = (
    "Something has set the weight to (almost) zero between two entries; a decay takes many steps. "
    "Look for in-place edits, masks and loading."
)
_NO_DECAY = (
    "The optimizer has no weight decay, so the loss drives the weight towards zero. Check that "
    "this is intended, as with a penalty of weights."
)

_NOT_BY_THE_OPTIMIZER = (
    "Something besides the optimizer has changed the weight. If nothing was loaded, reset or "
    "rescaled on purpose, look for in-place edits after optimizer.step()."
)

TEXTS = {
    Condition.UNCHANGED: Text(
        FindingCode.UNCHANGED_PARAMETER,
        "param",
        "The parameter has a gradient and never changes. Check that an optimizer has it, that its "
        "learning rate is above 0, and in bfloat16 or float16 that rounding does not remove its "
        "updates. Freeze it with requires_grad_(False) if that is intended.",
        _unchanged,
        "",
    ),
    Condition.LARGE: Text(FindingCode.LARGE_UPDATE, "param", _TOO_LARGE, _large, ""),
    Condition.GROWN: Text(
        FindingCode.GROWING_WEIGHT,
        "param",
        "The weight diverges. Lower the learning rate, add weight decay or clip gradients, and "
        "resume from an earlier checkpoint.",
        _grown,
        "The weights diverge. Lower the learning rate, warm it up or clip gradients, and resume "
        "from an earlier checkpoint.",
    ),
    Condition.SHRUNK: Text(
        FindingCode.SHRINKING_WEIGHT,
        "param",
        "The weight is driven towards zero, so its layer passes less and less. Lower the weight "
        "decay, or check the loss for a penalty of weights.",
        _shrunk,
        "Weights are driven towards zero. Lower the weight decay (learning rate x weight decay is "
        "the share that each step removes), or check the loss for a penalty of weights.",
    ),
    Condition.CLAMPED: Text(
        FindingCode.CLAMPED_WEIGHT,
        "param",
        "Elements are held at a bound, and their updates are lost. Look for clamp_ or clip on "
        "parameters. If the bound is intended, check that few elements reach it.",
        _clamped,
        "",
    ),
    Condition.SPIKE: Text(
        FindingCode.GRADIENT_SPIKE,
        "grad",
        "The gradient left its own past at this step. Check the batch of this step (labels, "
        "padding, outliers), clip gradients, and lower the learning rate if it happens again.",
        lambda now, row, limits: _moved(now, row, limits.spike),
        "",
    ),
    Condition.COLLAPSE: Text(
        FindingCode.GRADIENT_COLLAPSE,
        "grad",
        "The gradient has become tiny while others have not: the layers after this one no longer "
        "pass it. Look for saturated activations or dead ReLUs. Often a step was too large: lower "
        "the learning rate and resume from an earlier checkpoint.",
        lambda now, row, limits: _moved(now, row, limits.gradient_collapse),
        "",
    ),
    Condition.ZERO: Text(
        FindingCode.ZERO_GRADIENT,
        "grad",
        "No gradient reaches this weight any more. Check the following layers for dead ReLUs or "
        "masks, and the loss for saturation or underflow. An expert may get no tokens: balance the "
        "router.",
        _zero,
        "Most gradients have become zero, so these weights learn nothing. Check whether the loss "
        "is constant, masked or underflowing, and the last layers for dead ReLUs or saturation.",
    ),
    Condition.SMALL: Text(FindingCode.SMALL_UPDATE, "update", _TOO_SMALL, _small, ""),
    Condition.LOST: Text(
        FindingCode.MISSING_GRADIENT,
        "grad",
        "The parameter no longer contributes to the loss: a detach(), a branch that is not taken "
        "any more, or an expert without tokens. Freeze it if that is intended.",
        _lost,
        "Most parameters no longer get a gradient. Look for a detach() or no_grad() between them "
        "and the loss.",
    ),
    Condition.OUTSIDE: Text(
        FindingCode.CHANGED_OUTSIDE,
        "param",
        "Something besides the optimizer's step changes this parameter. That is expected of a "
        "moving average, a pruning mask, clipping, max_norm of an embedding, or loaded weights. "
        "Otherwise, look for in-place edits after optimizer.step().",
        _outside,
        "",
    ),
}
