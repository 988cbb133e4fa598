"""`Thresholds`: the limits of the health check."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """The limits that `Summary.findings` compares statistics with.

    >>> import torch, paramstats
    >>> summary = paramstats.summarize({"w": torch.eye(4)})
    >>> summary.findings()
    no findings
    >>> summary.findings(sparse_weight=0.5)
    INFO sparse weight: Most elements are zero. This is expected after pruning. Otherwise look for a
      mask or dead units.
        w  75% zeros

    Args:
        exploding_gradient: report a gradient whose norm is more than this many times the median
            norm of the gradients of all weights, if it also exceeds the norm of its parameter.
            Pascanu, Mikolov, Bengio 2013 describe the problem; the number is our own measurement.
        vanishing_gradient: report a weight's gradient whose norm is less than this fraction of the
            same median. Glorot, Bengio 2010: a good initialization gives all layers gradients of
            similar size. The number is our own measurement.
        largest_gradient_ratio: report a weight's gradient whose norm is more than this many times
            the norm of the weight. With plain SGD at a learning rate of 1e-3, one step would
            replace such a weight. A useful update changes a weight by about a thousandth.
        smallest_gradient_ratio: report a weight's gradient whose norm is less than this fraction
            of the norm of the weight. Plain SGD adds it to a float32 weight, whose precision is
            6e-8 (24 bits), so that rounding removes the update.
        largest_weight: report a weight whose root mean square is larger than this. Initialization
            gives values of 0.01 to 1.
        overflow: report a float16 or bfloat16 tensor whose largest absolute value is more than this
            fraction of the dtype's maximum (65,504 for float16). At 0.25, values can double twice
            before they overflow. Micikevicius et al. 2018, Mixed Precision Training, section 3.2.
        underflow: report a float16 or bfloat16 weight, or its gradient, whose largest absolute
            value is less than this many times the dtype's smallest normal number (6.1e-5 for
            float16). Below 1, values lose digits. Below 0.001, float16 rounds them to zero. Same
            paper, figure 3.
        sparse_weight: report a weight whose fraction of zeros is at least this.

    Each rule looks at a single summary. To see changes between steps, record a `History`. The four
    gradient thresholds are at least ten times beyond the most extreme values measured in healthy
    trainings with AdamW and SGD: perceptrons, convolutional, recurrent and residual networks,
    GPT-2, Llama, BERT and ViT. There the norms of weights' gradients were between 2e-5 and 1e3
    times the median of the model, and between 2e-7 and 80 times the norm of the weight.
    tests/test_findings.py repeats some of these trainings.
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


def make_thresholds(
    thresholds: Thresholds | Mapping[str, float] | None, changes: Mapping[str, float]
) -> Thresholds:
    """Return the thresholds that the arguments of `Summary.findings` describe.

    Raises TypeError if there is no threshold of a name in `thresholds` or `changes`.
    """
    if thresholds is None:
        thresholds = Thresholds()
    elif isinstance(thresholds, Mapping):
        changes = {**thresholds, **changes}
        thresholds = Thresholds()
    if not isinstance(thresholds, Thresholds):
        raise TypeError(
            f"paramstats.findings: expected paramstats.Thresholds or a dict for thresholds, got "
            f"{thresholds!r}; name the threshold, such as sparse_weight=0.5"
        )
    known = [field.name for field in dataclasses.fields(Thresholds)]
    for name in changes:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}"
            raise TypeError(
                f"paramstats.findings: expected the name of a threshold, got {name!r}; {hint}"
            )
    return dataclasses.replace(thresholds, **changes)
