"""The results of the health check: `Finding`, its code and severity, and the list `Findings`."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from textwrap import wrap
from typing import Literal

from paramstats._core.format import one_line_name

Source = Literal["param", "grad", "update", "buffer"]

_MAX_NAMES = 10
"""Names shown per group. After a NaN in the loss, for example, every gradient has a finding."""

_WIDTH = 100
"""Columns of the report."""

_CELL = '<td style="text-align: left; vertical-align: top">{}</td>'
_HTML_ROW = f'<tr style="background: {{}}">{4 * _CELL}</tr>'
_COLORS = ("", "none", "rgba(255, 170, 0, .22)", "rgba(230, 40, 40, .25)")
"""Background by severity: transparent, so that text stays readable on light and dark pages."""


class Severity(enum.IntEnum):
    """How serious a finding is. Severities can be compared: `Severity.ERROR > Severity.INFO`."""

    #: Nothing is wrong, but the fact may be useful, for example that a weight is sparse.
    INFO = 1
    #: Something is probably wrong. Check it.
    WARNING = 2
    #: The values are wrong. The training run cannot recover without a fix.
    ERROR = 3


class FindingCode(str, enum.Enum):
    """The kind of a finding. The value is a short description."""

    #: A parameter or buffer contains NaN; or a parameter contains an infinity.
    NONFINITE_PARAMETER = "NaN or Inf in parameter"
    #: A gradient contains NaN or an infinity.
    NONFINITE_GRADIENT = "NaN or Inf in gradient"
    #: Ranks that should hold equal tensors hold different ones.
    DIVERGED_REPLICAS = "replicas differ"
    #: A parameter requires a gradient and has none.
    MISSING_GRADIENT = "no gradient"
    #: All elements of a gradient are zero.
    ZERO_GRADIENT = "zero gradient"
    #: Gradients or activations grow over many layers.
    EXPLODING_GRADIENT = "exploding gradient"
    #: Gradients or activations shrink over many layers, so that the first ones learn nothing.
    VANISHING_GRADIENT = "vanishing gradient"
    #: A gradient is much larger or much smaller than its weight.
    GRADIENT_RATIO = "gradient/weight ratio"
    #: All elements of a weight are zero.
    ZERO_WEIGHT = "zero weight"
    #: All elements of a weight are equal and not zero.
    CONSTANT_WEIGHT = "constant weight"
    #: A float16 or bfloat16 tensor comes close to the dtype's maximum.
    OVERFLOW = "near overflow"
    #: A float16 or bfloat16 tensor is below the range in which its dtype is precise.
    UNDERFLOW = "underflow"
    #: Most elements of a weight are zero.
    SPARSE_WEIGHT = "sparse weight"
    #: The elements of a weight are far larger than its number of inputs allows.
    HUGE_WEIGHT = "huge weight"
    #: A step changes a weight by much of its size.
    LARGE_UPDATE = "large update"
    #: Rounding removes the update of most elements of a weight.
    LOST_UPDATE = "lost update"
    #: A parameter gets a gradient, and no optimizer has it.
    FORGOTTEN_PARAMETER = "not in the optimizer"
    #: Gradients have grown faster than Adam's second moment follows.
    LAGGING_VARIANCE = "second moment lags"
    #: Most gradients are smaller than Adam's eps.
    BELOW_EPS = "gradients below eps"
    #: Most rows of a weight are zero.
    ZERO_ROWS = "zero rows"
    #: Units or experts have no gradient.
    DEAD_UNITS = "dead units"
    #: Most rows of a weight are equal to another one.
    EQUAL_ROWS = "equal rows"
    #: A few elements are far larger than the others.
    HEAVY_TAILS = "heavy tails"
    #: Many elements would become 0 in float8.
    LOW_PRECISION = "too wide for float8"
    # Those of a history or of `watch(on_finding=...)` follow.
    #: A parameter has a gradient and does not change, while others do.
    UNCHANGED_PARAMETER = "parameter does not change"
    #: The norm of a weight has become a multiple of what it was.
    GROWING_WEIGHT = "growing weight"
    #: The norm of a weight has become a fraction of what it was.
    SHRINKING_WEIGHT = "shrinking weight"
    #: The smallest or largest element of a weight stays at a bound.
    CLAMPED_WEIGHT = "clamped weight"
    #: A gradient has left its own past, upwards.
    GRADIENT_SPIKE = "gradient spike"
    #: A gradient has left its own past, downwards, while others have not.
    GRADIENT_COLLAPSE = "gradient collapse"
    #: Steps have changed a weight by less than a millionth since the beginning.
    SMALL_UPDATE = "small update"
    #: Something besides the optimizer's step has changed a parameter.
    CHANGED_OUTSIDE = "changed outside of the optimizer"
    #: Gradients grow in proportion to the step, as if they were never reset.
    ACCUMULATED_GRADIENT = "gradients accumulate"


@dataclass(frozen=True, repr=False)
class Finding:
    """A problem or a remarkable fact that the health check found in one tensor.

    >>> import torch, paramstats
    >>> (finding,) = paramstats.summarize({"w": torch.full((8, 8), 0.5)}).findings()
    >>> finding
    <WARNING w: constant weight: std 0, all elements 0.5>
    >>> finding.name, finding.code.value, finding.severity.name
    ('w', 'constant weight', 'WARNING')
    >>> finding.advice
    'All units of this layer compute the same and stay equal. Initialize the weight randomly.'
    """

    severity: Severity
    code: FindingCode
    name: str
    """The name of the parameter or buffer; empty if the finding is about the whole model."""
    source: Source
    """What the finding is about: the parameter ("param"), its gradient, its update or a buffer."""
    value: float
    """The number that was compared with the threshold; NaN if the rule compares no number."""
    threshold: float
    """The limit that `value` was compared with; NaN if the rule compares no number."""
    message: str
    """What was found, in words."""
    advice: str
    """What it means and what to do."""
    step: int | None = None
    """The step at which it began; None in the findings of one summary."""
    end: int | None = None
    """The first step at which it was no longer found; None while it lasts."""

    def __repr__(self) -> str:
        name = _shown(self.name)
        return f"<{self.severity.name} {name}: {self.code.value}: {self.message}>"

    def __str__(self) -> str:
        return f"{_when(self)}{repr(self)[1:-1]}. {self.advice}"


class Findings(tuple[Finding, ...]):
    """A tuple of findings, the most severe first; empty if nothing was found.

    >>> import torch, paramstats
    >>> paramstats.summarize({"w": torch.full((8, 8), 0.5)}).findings()
    WARNING constant weight: All units of this layer compute the same and stay equal. Initialize the
      weight randomly.
        w  std 0, all elements 0.5

    It prints as a report, which shows up to ten tensors for each kind of finding. Iterate over it
    to get all findings.
    """

    __slots__ = ()

    def at_least(self, severity: Severity) -> Findings:
        """Return the findings of this severity and above."""
        if not isinstance(severity, Severity):
            raise TypeError(
                f"paramstats.Findings.at_least: expected a paramstats.Severity, got {severity!r}; "
                f"use paramstats.Severity.WARNING, for example"
            )
        return Findings(finding for finding in self if finding.severity >= severity)

    def __repr__(self) -> str:
        if not self:
            return "no findings"
        lines = []
        for group in _groups(self):
            first, rows = group[0], _rows(group)
            heading = f"{first.severity.name} {first.code.value}: {first.advice}"
            lines += wrap(heading, _WIDTH, subsequent_indent="  ", break_long_words=False)
            width = max(len(name) for name, message in rows if message)
            lines += [f"    {name:{width}}  {message}".rstrip() for name, message in rows]
        return "\n".join(lines)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return html_of_findings(self)


def html_of_findings(findings: Findings) -> str:
    """Return the report as an HTML table."""
    if not findings:
        return "<p>no findings</p>"
    lines = []
    for group in _groups(findings):
        first = group[0]
        names = "<br>".join(
            f"<code>{escape(name)}</code> {escape(message)}" if message else escape(name)
            for name, message in _rows(group)
        )
        cells = (first.severity.name, first.code.value, names, escape(first.advice))
        lines.append(_HTML_ROW.format(_COLORS[first.severity], *cells))
    return f"<table><tbody>{''.join(lines)}</tbody></table>"


def _groups(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Group findings of the same severity, code, source and advice."""
    groups: dict[tuple[Severity, FindingCode, Source, str], list[Finding]] = {}
    for finding in findings:
        key = finding.severity, finding.code, finding.source, finding.advice
        groups.setdefault(key, []).append(finding)
    return list(groups.values())


def _rows(group: list[Finding]) -> list[tuple[str, str]]:
    """Return (name, message) of the first findings, and how many more there are."""
    rows = [(_shown(f.name), f"{_when(f)}{f.message}") for f in group[:_MAX_NAMES]]
    more = len(group) - _MAX_NAMES
    return [*rows, (f"... and {more:,} more", "")] if more > 0 else rows


def _when(finding: Finding) -> str:
    """Return the steps of a finding over time, to put before its text; "" if it has none."""
    if finding.step is None:
        return ""
    end = "" if finding.end is None else f", ended at step {finding.end:,}"
    return f"step {finding.step:,}{end}: "


def _shown(name: str) -> str:
    return one_line_name(name) if name else "(model)"
