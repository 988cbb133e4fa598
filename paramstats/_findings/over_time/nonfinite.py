"""NaN and infinities over time: which came first, and whether a gradient scaler skips the step."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from paramstats._core.entries import entries
from paramstats._core.format import number
from paramstats._core.record import Record
from paramstats._findings.findings import Finding, FindingCode, Severity, Source
from paramstats._findings.over_time.entry import Now
from paramstats._findings.over_time.tracks import STAT

_MAX_SKIPPED = 4, 40
"""Entries and steps in a row with NaN or Inf in gradients: then, a scaler does not find its scale.

It halves the scale at each step, so it would have found one that was too large by 1e12.
"""

_COUNT, _NORM = STAT["nonfinite_count"], STAT["norm"]

_SKIPPED = (
    "Parameters stay finite, so these steps are skipped, as a gradient scaler does. That is normal "
    "while it searches its scale. If it lasts, the loss itself is NaN or overflows."
)
_GRADIENT = (
    "The backward pass produced NaN/Inf. Inspect the batch and the loss of this step, and the "
    "operations after this layer: a division, root or logarithm near 0, or an overflow."
)
_PARAMETER = (
    "An optimizer update introduced NaN/Inf, and the run cannot recover. Resume from a checkpoint "
    "before this step, with a lower learning rate or clipped gradients."
)
_FROM_THE_START = (
    "No step that was watched caused this. The parameter was probably created with torch.empty and "
    "not initialized, or loaded from a broken checkpoint. Initialize it, for example with "
    "torch.nn.init.kaiming_uniform_."
)


class Nonfinite:
    """Finds the first NaN or Inf.

    NaN or Inf in gradients alone is an error if the optimizer uses it. The parameters of the next
    entry show that; those of the same one, if it was taken after the optimizer's step.
    """

    def __init__(self) -> None:
        self._run = 0  # entries in a row with NaN or Inf in gradients
        self._skips = False  # whether a step with such gradients has left parameters finite
        self._scaled = False
        self._gradient: Finding | None = None
        self._parameter: Finding | None = None
        self._is_error = False
        self._before: frozenset[str] | None = None

    def set_before(self, record: Record) -> None:
        """Tell which parameters had NaN or Inf before the first step."""
        self._before = frozenset(
            entry.name
            for entry in entries(record, with_state=False)
            if entry.value.nonfinite_count > 0
        )

    @property
    def is_active(self) -> bool:
        """Whether `add` must be called for an entry without NaN and Inf, too."""
        return self._gradient is not None or self._parameter is not None

    def add(self, now: Now, after_step: bool, scaled: bool) -> list[Finding]:
        """Return the findings that exist at this entry."""
        values, grads = now.value[:, _COUNT] > 0, now.grad[:, _COUNT] > 0
        self._scaled = scaled
        if bool(values.any()):
            self._is_error |= self._run > 0
            was_finite = _has_past(now) or self._before == frozenset()
            is_first = self._parameter is self._gradient is None and was_finite
            if is_first and after_step and bool(grads.any()):  # the optimizer has used them
                self._gradient, self._is_error = _in_gradients(now, grads), True
            if self._parameter is None:
                self._parameter = self._in_parameters(now, values, was_finite)
        elif bool(grads.any()):
            self._parameter = None
            self._run += 1
            if self._gradient is None:
                self._gradient = _in_gradients(now, grads)
            self._skips |= after_step or self._run > 1
            entries, steps = _MAX_SKIPPED
            since = now.step - (self._gradient.step or 0)
            self._is_error = self._run >= entries and since >= steps
        else:
            self._skips |= self._run > 0
            self._parameter = self._gradient = None
            self._run, self._is_error = 0, False
        return self.findings(at_end=False)

    def findings(self, at_end: bool = True) -> list[Finding]:
        """Return the findings that exist.

        Args:
            at_end: also return what only the next entry would confirm.
        """
        found, gradient = [], self._gradient
        if gradient is not None:
            is_pending = self._parameter is None and self._run == 1 and not self._skips
            if self._is_error:
                found.append(gradient)
            elif self._run > 1 or (is_pending and at_end):
                found.append(gradient)
                if not is_pending or self._scaled:
                    found[-1] = dataclasses.replace(
                        gradient, severity=Severity.INFO, advice=_SKIPPED
                    )
        return found if self._parameter is None else [*found, self._parameter]

    def _in_parameters(self, now: Now, affected: Tensor, was_finite: bool) -> Finding:
        """Return the finding of the first parameter in the order of the model."""
        rows = affected.nonzero()[:, 0].tolist()
        advice = _PARAMETER if was_finite else _FROM_THE_START
        if not was_finite and self._before:  # the step has spread it
            rows = [row for row in rows if now.plan.names[row] in self._before] or rows
        row, count = rows[0], int(now.value[rows[0], _COUNT])
        message = f"{count:,} of {int(now.value[row, 0]):,} elements NaN or Inf"
        if not was_finite and self._before:
            message = f"NaN or Inf before the first step, now {message}"
        message += _others(len(rows), len(affected), "parameters")
        last = now.rows.numbers["last_step"][row]
        if self._gradient is None and float(last) == float(last):
            norm = float(now.rows.grad[row, _NORM])
            message += f"; at step {int(last)} they were finite"
            if math.isfinite(norm):
                message += f", with a gradient norm of {number(norm)}"
        code = FindingCode.NONFINITE_PARAMETER
        return _finding(code, now, row, "param", count, message, advice)


def _has_past(now: Now) -> bool:
    """Return whether there was an entry before, in which parameters were finite."""
    return bool((now.rows.numbers["last_step"] > -math.inf).any())


def _in_gradients(now: Now, affected: Tensor) -> Finding:
    """Return the finding of the first gradient in the order of the backward pass."""
    rows = affected.nonzero()[:, 0].tolist()
    row, count = rows[-1], int(now.grad[rows[-1], _COUNT])
    message = f"{count:,} of {int(now.grad[row, 0]):,} elements NaN or Inf"
    message += _others(len(rows), int(now.has_grad.sum()), "gradients")
    return _finding(FindingCode.NONFINITE_GRADIENT, now, row, "grad", count, message, _GRADIENT)


def _others(affected: int, of: int, what: str) -> str:
    return f"; the first of {affected} of {of} {what}" if affected > 1 else ""


def _finding(
    code: FindingCode, now: Now, row: int, source: Source, count: int, message: str, advice: str
) -> Finding:
    name, step = now.plan.names[row], int(now.step)
    return Finding(Severity.ERROR, code, name, source, count, 0, message, advice, step=step)
