"""Rules about the rows of a weight, and about the distribution of its elements.

A row is an index of dimension 0: a unit, an output channel or an expert. Which rows are zero is
always known. Equal rows and distributions need `rows` and `distribution` of `summarize`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from paramstats._core.details import Detail, Distribution, kurtosis, zero_rows_of
from paramstats._core.entries import Entry
from paramstats._core.estimates import below
from paramstats._core.format import number
from paramstats._core.low_precision import FORMATS
from paramstats._findings.context import Context
from paramstats._findings.findings import Finding, FindingCode, Severity, Source
from paramstats._findings.structure import Part, parts_of
from paramstats._rows import Rows

_STEPS = 20
"""A unit that never had a gradient in so many steps is dead, whatever the batches contained."""

_DEAD_EXPERTS = 0.1
"""The share of the experts of a stacked weight. In a large one, a few get no tokens in a batch."""

_LEAST_UNITS = 16
"""A smaller layer is likely a head, of whose outputs a loss may use some only."""

_ADVICE = {
    (False, False): "These units are inactive for the whole batch, such as dead ReLUs. If they "
    "stay so, lower the learning rate, check their biases, or use GELU or leaky ReLU.",
    (False, True): "These units have been inactive since the first step, such as dead ReLUs. Check "
    "the initialization of the weight and the bias, lower the learning rate, or use GELU or leaky "
    "ReLU.",
    (True, False): "These experts received no tokens in this batch. If they never do, balance the "
    "router: add a load-balancing loss, or noise, or a bias for each expert.",
    (True, True): "These experts have never received a token. Balance the router: add a "
    "load-balancing loss, or noise, or a bias for each expert.",
}
"""What to do, by whether it is about experts, and whether they are dead for certain."""

_USUAL = 0.6
"""Up to this share of the units are inactive in a small batch of a healthy training."""

_CONVERGED = 1e-8
"""A gradient below this fraction of its weight may be zero because of rounding."""

_MAX_ROWS = 8
"""Number of rows that a message lists."""


def rows_and_distributions(context: Context) -> Iterator[Finding]:
    """Report rows that are zero or equal, and distributions that fit no low precision."""
    details, n = context.record.details, len(context.entries)
    if not details:
        return
    for part in parts_of(context.record.layout):
        value, grad = details.get(part.row), details.get(n + part.row)
        entry = context.entries[part.row]
        if value is not None:
            if not part.is_lookup:
                yield from _zero_rows(context, part, entry, value, grad)
                yield from _equal_rows(context, entry, value)
            yield from _distribution(context, entry, value, "param")
        if grad is not None:
            yield from _dead_units(context, part, entry, grad)
            yield from _distribution(context, entry, grad, "grad")


def _zero(detail: Detail | None) -> Sequence[int]:
    packed = None if detail is None else detail.zero_rows
    return () if packed is None else zero_rows_of(packed) or ()


def _zero_rows(
    context: Context, part: Part, entry: Entry, value: Detail, grad: Detail | None
) -> Iterator[Finding]:
    """Report a weight most of whose rows are zero. It is a warning if they will stay so."""
    rows, limit = _zero(value), context.thresholds.zero_rows
    if not entry.shape or not len(rows) > limit * entry.shape[0]:
        return
    is_stuck = entry.grad is None or entry.grad.norm == 0 or set(rows) <= set(_zero(grad))
    is_frozen = context.has_trainable and not entry.requires_grad
    severity = Severity.WARNING if is_stuck and not is_frozen else Severity.INFO
    advice = (
        "These units output only their bias. If they were not pruned, check the initialization and "
        "what loads the weight."
    )
    if not is_stuck:
        advice += " They have a gradient, so they will change with the next step."
    code, share = FindingCode.ZERO_ROWS, len(rows) / entry.shape[0]
    message = in_words(rows, entry.shape[0], "zero")
    yield Finding(severity, code, entry.name, "param", share, limit, message, advice)


def _dead_units(context: Context, part: Part, entry: Entry, grad: Detail) -> Iterator[Finding]:
    """Report a weight most of whose units, or any of whose experts, have no gradient.

    A unit has a bias or a normalization, whose gradient is zero as well. An embedding has neither.
    In a small batch, a ReLU may be inactive for all samples. It is a warning if the optimizer has
    made many steps and its momentum is still zero.
    """
    assert entry.shape is not None  # as of every weight
    rows, n, limit = _zero(grad), entry.shape[0], context.thresholds.dead_units
    if not rows or part.is_lookup or entry.grad is None:
        return
    if entry.grad.norm < _CONVERGED * entry.value.norm:
        return
    share, what, momentum_of = len(rows) / n, "units", part.row
    is_stacked = len(entry.shape) == 3 and min(entry.shape[1:]) > 1 and part.units is None
    if is_stacked:
        what, limit = "experts", _DEAD_EXPERTS
    elif part.units is None or n < _LEAST_UNITS:
        return
    else:
        momentum_of, units = part.units, context.entries[part.units].grad
        if units is None or units.zero_count < len(rows):
            return
    if not share > limit:
        return
    never = _share_without_momentum(context, momentum_of)
    is_dead = never > limit
    message = in_words(rows, n, f"of the gradient zero: these {what} do not learn")
    if share <= _USUAL and not is_stacked:
        message += ", as is usual in a small batch"
    if is_dead:
        message += f"; {100 * never:.4g}% never had a gradient"
    advice = _ADVICE[is_stacked, is_dead]
    severity = Severity.WARNING if is_dead else Severity.INFO
    code = FindingCode.DEAD_UNITS
    yield Finding(severity, code, entry.name, "grad", share, limit, message, advice)


def _share_without_momentum(context: Context, row: int) -> float:
    """Return the share of elements whose momentum is zero after many steps; 0 if not known."""
    optimizer = context.record.optimizer
    columns = [optimizer.column(key) for key in ("step", "exp_avg")] if optimizer else []
    if optimizer is None or None in columns:
        return 0.0
    step, momentum = (optimizer.state(column, row) for column in columns if column is not None)
    return momentum.zeros / momentum.count if step.mean >= _STEPS and momentum.count > 0 else 0.0


def _equal_rows(context: Context, entry: Entry, value: Detail) -> Iterator[Finding]:
    """Report a weight most of whose rows are equal to another one."""
    if value.rows is None or not entry.dtype.is_floating_point or not entry.value.std > 0:
        return
    groups, limit = Rows(value.rows, 1.0, 1.0).equal, context.thresholds.equal_rows
    rows = sorted(row for group in groups for row in group)
    assert entry.shape is not None  # as of every weight
    share = len(rows) / entry.shape[0]
    if not share > limit:
        return
    is_frozen = context.has_trainable and not entry.requires_grad
    # Other parameters, such as the decay rates of state-space models, may be equal by design.
    is_weight = "weight" in entry.name.rpartition(".")[2]
    severity = Severity.WARNING if is_weight and not is_frozen else Severity.INFO
    code = FindingCode.EQUAL_ROWS
    what = "each other" if len(groups) == 1 else f"another one, in {len(groups)} groups"
    message = in_words(rows, entry.shape[0], f"equal to {what}")
    advice = (
        "Units with equal weights compute the same, and get equal gradients if the next layer "
        "treats them equally. Initialize every row with other random numbers, and check what "
        "copies or loads the weight."
    )
    yield Finding(severity, code, entry.name, "param", share, limit, message, advice)


def _distribution(
    context: Context, entry: Entry, detail: Detail, source: Source
) -> Iterator[Finding]:
    """Report heavy tails, and elements that become 0 in float8 though scaled to its maximum."""
    if detail.distribution is None:
        return
    limits, code = context.thresholds, FindingCode.HEAVY_TAILS
    statistics = entry.value if source == "param" else entry.grad
    distribution = Distribution.unpack(detail.distribution)
    tails = kurtosis(distribution)
    if statistics is None or not statistics.abs_max > 0:
        return
    if tails > limits.heavy_tails and statistics.zero_fraction < limits.sparse_weight:
        ratio = statistics.abs_max / statistics.rms
        message = f"kurtosis {number(tails)}, the largest element is {number(ratio)} times the rms"
        advice = (
            "A few elements are far larger than the others. They decide the scale of low-precision "
            "formats and are cut by clipping. Use a scale for each channel or block."
        )
        limit = limits.heavy_tails
        yield Finding(Severity.INFO, code, entry.name, source, tails, limit, message, advice)
    name = "float8_e5m2" if source == "grad" else "float8_e4m3fn"
    # Gradients are counted before they are divided by the loss scale.
    largest = _abs_max(context, entry, source)
    scale = FORMATS[name].saturated / largest
    _, n, _ = below(distribution, largest, FORMATS[name].flushed / scale, True)
    share = n / max(1, distribution.n)
    if share > limits.low_precision:
        code, limit = FindingCode.LOW_PRECISION, limits.low_precision
        message = f"{100 * share:.3g}% of the elements would become 0 in {name}"
        advice = (
            "That is with one scale for the tensor, that of its largest element. Use a scale for "
            "each row or block, or a wider format for this tensor."
        )
        yield Finding(Severity.INFO, code, entry.name, source, share, limit, message, advice)


def _abs_max(context: Context, entry: Entry, source: Source) -> float:
    """Return the largest magnitude as in memory."""
    largest = entry.value.abs_max
    if source == "grad":
        assert entry.grad is not None
        largest = entry.grad.abs_max * context.record.grad_scale
    return largest if largest < math.inf else math.nan


def in_words(rows: Sequence[int], n: int, what: str) -> str:
    """Return which rows these are, such as "rows 0, 1, 2 of 8 zero"."""
    shown = ", ".join(map(str, rows[:_MAX_ROWS]))
    if len(rows) > _MAX_ROWS:
        return f"{len(rows):,} of {n:,} rows ({shown}, ...) {what}"
    return f"rows {shown} of {n:,} {what}"
