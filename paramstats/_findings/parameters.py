"""Rules about parameters and buffers themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from paramstats._core.entries import Entry
from paramstats._core.format import number, one_line_name
from paramstats._core.moments import Moments
from paramstats._findings.context import (
    Context,
    count_elements,
    is_additive,
    is_zero_with_gradient,
    nonfinite_elements,
)
from paramstats._findings.findings import Finding, FindingCode, Severity, Source
from paramstats._findings.structure import Part, parts_of

_LARGE_RMS = 2.0
"""A weight below this is not too large, whatever fan-in is: new embeddings have an rms of 1."""

_SCALED_DOWN = 1e-4
"""The relative gradient of all weights of a model that multiplies them by a small constant."""

_NONFINITE = {"param": "nonfinite_count", "buffer": "nan_count"}
_NONFINITE_ADVICE = {
    "param": "An optimizer update introduced NaN/Inf. Lower the learning rate or inspect the "
    "previous step.",
    "buffer": "The input of this layer contained NaN. Check the data, then reset the buffer.",
}
_NOT_TRAINED = (
    "The model has no gradient yet, so no update caused this. The parameter was probably created "
    "with torch.empty and not initialized, or loaded from a broken file. Initialize it, for "
    "example with torch.nn.init.kaiming_uniform_."
)


def nonfinite_parameters(context: Context) -> Iterator[Finding]:
    """Report NaN in parameters and buffers, and infinities in parameters.

    Infinities in buffers are masks. A file does not say what is a buffer: there, a mask is what has
    -Inf and one other value.
    """
    affected = [
        (entry, count)
        for row, entry in enumerate(context.entries)
        if (count := int(getattr(entry.value, _NONFINITE[entry.kind])))
        and not (context.record.file is not None and is_mask(context.record.state(row)))
    ]
    optimizer = context.record.optimizer
    has_steps = optimizer is not None and len(optimizer.keys) > 0
    is_new = context.has_trainable and not context.has_gradients and not has_steps
    for position, (entry, count) in enumerate(affected):
        advice = _NONFINITE_ADVICE[entry.kind]
        if is_new and entry.kind == "param":
            advice = _NOT_TRAINED
        if len(affected) > 1 and position == 0 and context.record.file is None:
            advice = f"The first of {len(affected)} in model order. {advice}"
        code, message = FindingCode.NONFINITE_PARAMETER, nonfinite_elements(entry.value)
        yield Finding(Severity.ERROR, code, entry.name, entry.kind, count, 0, message, advice)


def is_mask(state: Moments) -> bool:
    """Return whether elements are -Inf and one other value, as in the mask of attention."""
    return not (state.nans or state.pos_infs or state.m2) and state.neg_infs < state.count


def diverged_replicas(context: Context) -> Iterator[Finding]:
    """Report tensors that should be equal on several ranks and are not."""
    code = FindingCode.DIVERGED_REPLICAS
    advice = (
        "Replicas should be equal on all ranks. A rank missed an update, started from other "
        "values, or has faulty memory. Load the same checkpoint on all ranks."
    )
    names = set(context.record.layout.names)
    for row_name, ranks in context.record.diverged.items():
        name, _, what = row_name.rpartition(" (")
        if row_name in names or name not in names:
            name, what = row_name, ""
        source: Source = "grad" if what == "gradient)" else "param"
        # Of the optimizer's state, such as "exp_avg: rank 1 differs from rank 0".
        message = f"{what[:-1]}: {ranks}" if source == "param" and what else ranks
        message = one_line_name(message)
        yield Finding(Severity.ERROR, code, name, source, math.nan, math.nan, message, advice)


def weight_values(context: Context) -> Iterator[Finding]:
    """Report weights that are all zero, constant, very large or sparse.

    Biases and normalization layers are excluded by `is_weight`: new ones are constant.
    """
    limits = context.thresholds
    weights = [(part, context.entries[part.row]) for part in parts_of(context.record.layout)]
    mostly_zero = 2 * sum(entry.value.zero_fraction == 1 for _, entry in weights) > len(weights)
    # A new model may contain a few zero weights on purpose. The first backward pass shows whether
    # they get a gradient.
    is_new = context.has_trainable and not context.has_gradients and not mostly_zero
    is_scaled_down = _is_scaled_down(weights)
    for part, entry in weights:
        value = entry.value
        if value.nonfinite_count:
            continue
        if not (entry.dtype.is_floating_point or entry.dtype.is_complex):
            continue
        is_frozen = context.has_trainable and not entry.requires_grad
        severity = Severity.WARNING
        if value.zero_fraction == 1:
            code, number_found, limit = FindingCode.ZERO_WEIGHT, 1.0, 1.0
            message = f"all {count_elements(value)} zero"
            advice = (
                "All weights are zero, so nothing passes through this layer. Check initialization, "
                "loading and pruning."
            )
            if is_zero_with_gradient(entry):
                advice = (
                    "The weight is zero but gets a gradient (e.g. LoRA B). The next step changes "
                    "it, unless something resets it. Earlier layers get no gradient until then."
                )
            is_gate = is_zero_with_gradient(entry) or context.has_zero_gates
            if is_gate or is_frozen or is_new or is_additive(entry):
                severity = Severity.INFO
        elif value.std == 0 and value.count > 1:
            code, number_found, limit = FindingCode.CONSTANT_WEIGHT, 0.0, 0.0
            message = f"std 0, all elements {number(value.mean)}"
            advice = (
                "All units of this layer compute the same and stay equal. Initialize the weight "
                "randomly."
            )
            # All ones is a normalization over several dimensions. An image that is optimized may be
            # constant, too: its elements have other gradients.
            varies = entry.grad is not None and entry.grad.std > 0 and not _is_called_weight(entry)
            if is_frozen or value.mean == 1 or is_additive(entry) or varies:
                severity = Severity.INFO
        elif (
            value.rms > _LARGE_RMS
            and value.rms * part.root_fan_in > limits.largest_gain
            and not part.is_lookup
        ):
            code, number_found = FindingCode.HUGE_WEIGHT, value.rms * part.root_fan_in
            limit = limits.largest_gain
            message = f"rms {number(value.rms)}, scales its input by {number(number_found)}"
            advice = (
                "The layer saturates what follows or makes the loss explode: a std of about "
                "1 / sqrt(fan-in) keeps the scale of its input. In a new model, correct the "
                "initialization. Otherwise the weight diverged: lower the learning rate and resume "
                "from an earlier checkpoint."
            )
            if is_frozen or is_scaled_down:
                severity = Severity.INFO
        elif value.zero_fraction >= limits.sparse_weight:
            code, severity = FindingCode.SPARSE_WEIGHT, Severity.INFO
            number_found, limit = value.zero_fraction, limits.sparse_weight
            message = f"{100 * value.zero_fraction:.4g}% zeros"
            advice = (
                "Most elements are zero. This is expected after pruning. Otherwise look for a mask "
                "or dead units."
            )
        else:
            continue
        yield Finding(severity, code, entry.name, "param", number_found, limit, message, advice)


def _is_called_weight(entry: Entry) -> bool:
    return "weight" in entry.name.rpartition(".")[2]


def _is_scaled_down(weights: Sequence[tuple[Part, Entry]]) -> bool:
    """Return whether the gradients of all weights are tiny, those of large ones included.

    A model that multiplies large weights by a small constant in forward() (equalized learning rate)
    has such gradients. The last layer of others has a normal one, even if layers saturate.
    """
    ratios = [
        entry.grad.norm / entry.value.norm
        for _, entry in weights
        if entry.grad is not None and entry.value.norm > 0
    ]
    return bool(ratios) and max(ratios) < _SCALED_DOWN and min(ratios) > 0
