"""The health check: what in a summary asks for a look, the most pressing first. See rules.py."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from paramstats._core.format import one_line_name

Where = Literal["param", "grad", "buffer"]

_SHOWN = 10
"""Names printed of each kind; a NaN in the loss is in every gradient a step later."""


class Severity(enum.IntEnum):
    """How pressing: an ERROR spoils the run, a WARNING wants a look, INFO is good to know."""

    INFO = 1
    WARNING = 2
    ERROR = 3


class FindingCode(str, enum.Enum):
    """What is odd."""

    NONFINITE_PARAMETER = "NaN or Inf in parameter"
    NONFINITE_GRADIENT = "NaN or Inf in gradient"
    DIVERGED_COPIES = "copies differ"
    MISSING_GRADIENT = "no gradient"
    ZERO_GRADIENT = "zero gradient"
    EXPLODING_GRADIENT = "exploding gradient"
    VANISHING_GRADIENT = "vanishing gradient"
    GRADIENT_RATIO = "gradient out of proportion"
    DEAD_WEIGHT = "dead weight"
    CONSTANT_WEIGHT = "constant weight"
    OVERFLOW = "near overflow"
    UNDERFLOW = "underflow"
    SPARSE_WEIGHT = "sparse weight"
    HUGE_WEIGHT = "huge weight"


@dataclass(frozen=True)
class Thresholds:
    """From where on something is a finding.

    >>> import torch, paramstats
    >>> summary = paramstats.summarize({"w": torch.eye(4)})
    >>> summary.findings()
    ()
    >>> print(summary.findings(paramstats.Thresholds(sparse_weight=0.5)))
    INFO sparse weight: Well if it was pruned; else look for a mask or dead units
        w  75% zeros

    Args:
        exploding_gradient: gradient norm over the median of the model's weights', of gradients
            larger than their parameter. Pascanu, Mikolov, Bengio 2013 describe the problem; the
            number is ours.
        vanishing_gradient: the same ratio, from below. Glorot, Bengio 2010: norms that stay alike
            from layer to layer are what initialisation is for; the number is ours.
        largest_gradient_ratio: gradient norm over parameter norm. At a learning rate of 1e-3 plain
            SGD would replace such a weight in one step; useful updates change it by a thousandth.
        smallest_gradient_ratio: the same from below. Added to a float32 weight (24 bits: 6e-8) by
            plain SGD, such a gradient is lost in rounding.
        largest_weight: root mean square of a weight. Initialisers give 0.01 to 1.
        overflow: largest magnitude over the type's largest number, of float16 (65,504) and
            bfloat16: at 0.25 two doublings are left. Micikevicius et al. 2018, Mixed Precision
            Training, section 3.2.
        underflow: largest magnitude over the type's smallest normal number (6.1e-5 in float16):
            below 1 digits are lost, below 0.001 everything. The same, statistic 3.
        sparse_weight: share of zeros in a weight.

    All compare within one summary: what grows from step to step is for a `History`. The gradient
    thresholds leave a factor of ten or more to the extremes of healthy trainings of perceptrons,
    convolutional, recurrent and residual networks, GPT-2, Llama, BERT and ViT with AdamW and SGD
    (tests/test_findings.py trains some of them): norms of weights' gradients there were 2e-5 to 1e3
    times the model's median, and 2e-7 to 80 times the weight's own norm.
    """

    exploding_gradient: float = 1e4
    vanishing_gradient: float = 1e-6
    largest_gradient_ratio: float = 1e3
    smallest_gradient_ratio: float = 1e-9
    largest_weight: float = 1e3
    overflow: float = 0.25
    underflow: float = 1.0
    sparse_weight: float = 0.9

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (isinstance(value, (int, float)) and value >= 0):
                raise ValueError(
                    f"paramstats.Thresholds: expected a number of 0 or more for {name}, "
                    f"got {value!r}"
                )


@dataclass(frozen=True)
class Finding:
    """One thing that asks for a look.

    >>> import torch, paramstats
    >>> (finding,) = paramstats.summarize({"w": torch.full((8, 8), 0.5)}).findings()
    >>> finding.name, finding.code.value, finding.severity.name
    ('w', 'constant weight', 'WARNING')
    >>> finding.message, finding.advice
    ('std 0, all elements 0.5', 'All its units learn the same: initialise it at random')
    """

    severity: Severity
    code: FindingCode
    name: str
    """The parameter's."""
    source: Where
    """Whether it is the parameter (or buffer) itself or its gradient."""
    value: float
    """What was found; NaN where it is no number."""
    threshold: float
    """What the value has passed."""
    message: str
    """The value in words, with its unit."""
    advice: str

    def __str__(self) -> str:
        name = one_line_name(self.name)
        return f"{self.severity.name} {name}: {self.code.value}: {self.message}. {self.advice}"


class Findings(tuple[Finding, ...]):
    """Findings, the most severe first; prints as a report, and is empty where all is well."""

    __slots__ = ()

    def at_least(self, severity: Severity) -> Findings:
        """Those as severe, or more."""
        if not isinstance(severity, Severity):
            raise TypeError(
                f"paramstats.Findings: expected a paramstats.Severity, got {severity!r}"
            )
        return Findings(finding for finding in self if finding.severity >= severity)

    def __str__(self) -> str:
        if not self:
            return "no findings"
        lines = []
        for group in _alike(self):
            first = group[0]
            lines.append(f"{first.severity.name} {first.code.value}: {first.advice}")
            width = max(len(one_line_name(finding.name)) for finding in group[:_SHOWN])
            for finding in group[:_SHOWN]:
                lines.append(f"    {one_line_name(finding.name):{width}}  {finding.message}")
            if len(group) > _SHOWN:
                lines.append(f"    ... and {len(group) - _SHOWN} more")
        return "\n".join(lines)


def _alike(findings: Iterable[Finding]) -> list[list[Finding]]:
    groups: dict[tuple[Severity, FindingCode, Where], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.code, finding.source), []).append(finding)
    return list(groups.values())
