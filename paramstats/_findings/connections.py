"""Rules about parameters without a gradient, or with one of zeros: what cuts them off the loss.

It is a warning if everything before some layer is cut off. A single layer that is cut off may have
been skipped, as by stochastic depth, or may be unused on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import NamedTuple

from paramstats._core.entries import Entry
from paramstats._core.format import one_line_name
from paramstats._findings.context import Context, count_elements, is_additive, is_weight
from paramstats._findings.findings import Finding, FindingCode, Severity
from paramstats._findings.structure import module_of, parts_of

_GATED = (
    "The gradient is zero because a later layer's weights are all zero; this resolves once they "
    "are updated."
)
_SKIPPED = (
    "Layers of the same structure have a gradient, so this one was skipped in this step: "
    "stochastic depth, or an expert that received no tokens."
)
_TWIN = (
    "A network of the same structure has gradients. This is expected of a target network or a "
    "moving average; freeze it with requires_grad_(False)."
)
_NO_OPTIMIZER = "No optimizer has the parameter, so it is not trained in this step."
UNUSED = (
    "The parameter did not contribute to the loss of this step: unused in forward(), such as a "
    "pooler or a mask token. If this is intended for all steps, freeze it with "
    "requires_grad_(False)."
)
_ZERO = (
    "No gradient reaches this parameter in this step. If this stays so, check the following layers "
    "for dead ReLUs or masks."
)


class _Cut(NamedTuple):
    """The weights that are cut off, by row."""

    before: Collection[int]
    """Everything up to a layer."""
    at: str
    """In words, the first layer with a gradient after these."""
    reasons: dict[int, str]
    """Why it is no problem, for some of the others."""
    zero: str
    """The name of a frozen parameter of zeros before that layer, which may be the reason."""


def lost_gradients(context: Context) -> Iterator[Finding]:
    """Report parameters without a gradient, if others have one, and gradients of zeros only."""
    if not context.has_gradients:
        yield from _no_backward(context)
        return
    lost = [
        row
        for row, entry in enumerate(context.entries)
        if (entry.requires_grad if entry.grad is None else _is_zero(entry))
    ]
    if not lost:
        return
    if all(_is_zero(entry) for entry in context.entries if entry.grad is not None):
        yield _constant_loss()
        return
    cut = _cut(context, set(lost))
    modules = {module_of(context.entries[row].name) for row in cut.before}
    for row in lost:
        entry = context.entries[row]
        is_cut = row in cut.before
        if entry.grad is None:
            is_cut |= not is_weight(entry) and module_of(entry.name) in modules
            code, value, message = (
                FindingCode.MISSING_GRADIENT,
                math.nan,
                "requires a gradient, has none",
            )
            advice = cut.reasons.get(row, UNUSED)
            if is_cut:
                advice = (
                    f"No layer before {cut.at} gets a gradient. Just before it, look for detach(), "
                    ".data, item(), argmax or torch.no_grad(). If this is intended, freeze these "
                    "layers with requires_grad_(False)."
                )
        else:
            is_cut &= not context.has_zero_gates
            code, value = FindingCode.ZERO_GRADIENT, 1.0
            message = f"all {count_elements(entry.grad)} zero"
            advice = _GATED if context.has_zero_gates else cut.reasons.get(row, _ZERO)
            if is_cut or (module_of(entry.name) in modules and advice != _GATED):
                advice = (
                    f"No gradient reaches the layers before {cut.at}. Check them for dead ReLUs or "
                    "masks, and the loss for saturation or underflow."
                )
                if cut.zero:
                    advice = (
                        f"No gradient reaches the layers before {cut.at}: {cut.zero!r} is frozen "
                        "at zero, so nothing passes it. Set it to another value, or train it."
                    )
        severity = Severity.WARNING if is_cut else Severity.INFO
        yield Finding(severity, code, entry.name, "grad", value, value, message, advice)


def _no_backward(context: Context) -> Iterator[Finding]:
    """Report, once, that no parameter has a gradient though some require one."""
    n = sum(context.record.layout.requires_grad)
    if context.has_trainable:
        message = f"none of {n:,} parameters that require a gradient has one"
        advice = (
            "This is normal before the first backward pass, and with grads=False. Otherwise call "
            "paramstats after loss.backward() and before zero_grad()."
        )
        code, nan = FindingCode.MISSING_GRADIENT, math.nan
        yield Finding(Severity.INFO, code, "", "grad", nan, nan, message, advice)


def _constant_loss() -> Finding:
    """Report, once, that every gradient is zero, those of the last biases included."""
    advice = (
        "Call paramstats after backward and before zero_grad(): zero_grad(set_to_none=False) "
        "leaves zeros. Otherwise the loss does not depend on the parameters for this batch: a "
        "margin is reached, all targets are masked, or the loss underflows."
    )
    code, message = FindingCode.ZERO_GRADIENT, "all gradients are zero"
    return Finding(Severity.INFO, code, "", "grad", 1.0, 1.0, message, advice)


def _is_zero(entry: Entry) -> bool:
    grad = entry.grad
    return grad is not None and grad.count > 0 and grad.zero_fraction == 1


def _cut(context: Context, lost: set[int]) -> _Cut:
    """Return which weights are cut off together with everything before them."""
    entries, optimizer = context.entries, context.record.optimizer
    reasons = _similar(context, lost)
    if optimizer is not None and any(numbers for numbers in optimizer.hyperparameters):
        absent = {row for row in lost if optimizer.hyperparameters[row] is None}
        reasons.update(dict.fromkeys(absent, _NO_OPTIMIZER))
    before: set[int] = set()
    at, end = "the loss", len(entries)
    for part in parts_of(context.record.layout):
        row = part.row
        if not entries[row].requires_grad or part.is_tied:
            continue
        if row not in lost:
            at, end = f"'{one_line_name(entries[row].name)}'", row
            break
        if reasons.get(row) not in (_TWIN, _NO_OPTIMIZER):
            before.add(row)
    if _is_one_block(context, before):
        before = {row for row in before if reasons.get(row) != _SKIPPED}
    zero = ""
    for entry in entries[:end]:
        if entry.kind == "param" and not entry.requires_grad and entry.value.zero_fraction == 1:
            zero = zero if is_additive(entry) else one_line_name(entry.name)
    return _Cut(before, at, reasons, zero)


def _is_one_block(context: Context, rows: Collection[int]) -> bool:
    """Return whether these are several weights of one block."""
    blocks = [part.block for part in parts_of(context.record.layout) if part.row in rows]
    return len(blocks) > 1 and len(set(blocks)) == 1


def _similar(context: Context, lost: set[int]) -> dict[int, str]:
    """Return what is known of lost parameters of modules that have a sibling with gradients.

    A sibling has the same parent and parameters of the same names and shapes. Numbered modules are
    layers or experts. Named ones are twins, if they have several weights.
    """
    entries = context.entries
    trees: dict[str, list[tuple[int, str]]] = {}
    for row, entry in enumerate(entries):
        path, dot, rest = entry.name, ".", ""
        while dot and entry.requires_grad:
            path, dot, last = path.rpartition(".")
            rest = f"{last}.{rest}"
            if path:
                trees.setdefault(path, []).append((row, rest))
    siblings: dict[object, list[str]] = {}
    for path, rows in trees.items():
        signature = tuple((rest, entries[row].shape) for row, rest in rows)
        siblings.setdefault((module_of(path), signature), []).append(path)
    reasons: dict[int, str] = {}
    for paths in siblings.values():
        dead = [path for path in paths if all(row in lost for row, _ in trees[path])]
        if not 0 < len(dead) < len(paths):
            continue
        for path in dead:
            lost_rows = [row for row, _ in trees[path]]
            is_numbered = path.rpartition(".")[2].isdigit()
            if is_numbered or sum(is_weight(entries[row]) for row in lost_rows) > 1:
                reason = _SKIPPED if is_numbered else _TWIN
                reasons.update(dict.fromkeys(lost_rows, reason))
    return reasons
