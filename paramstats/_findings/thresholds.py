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
        largest_update_ratio: report a weight whose last update has a norm of more than this many
            times its own, and that of a new weight of its shape: sqrt(size / fan), where fan is the
            smaller one of fan-in and fan-out. Also report a weight that Adam can change by this
            fraction in one step: lr * sqrt(fan), unless ten such steps are less than the weight.
            The number is our own measurement.
        lost_updates: report a weight of whose elements with a gradient more than this fraction did
            not change. The number is our own measurement.
        largest_lag: report a weight whose root mean square of gradient / sqrt(second moment) is
            larger than this. Wortsman et al. 2023, Stable and low-precision training for
            large-scale vision-language models, observe loss spikes a few steps after it grows. At
            most, it is sqrt(1 / (1 - beta2)): 32 for Adam's default. The number is our own
            measurement.
        below_eps: report a weight of whose elements with a gradient more than this fraction have a
            second moment below eps^2. Updates of the others are at least half as large as without
            eps.
        largest_change: over time: report a weight that changes by more than this fraction of its
            norm, or of that of a new weight of its shape, per step. Of the change between two
            entries, a lower bound is known.
        smallest_update: over time: report a weight whose updates have always been below ten times
            this fraction of its norm, or of that of a new weight of its shape, and are below it.
            It is a warning if it is true of most weights. Needs `watch(optimizer=...)`.
        weight_growth: over time: report a weight whose norm is more than this many times its first
            norm, and that of a new weight of its shape.
        weight_collapse: over time: report a weight whose norm falls below this fraction of its
            first norm.
        spike: over time: report a gradient whose norm is more than this many times the median of
            its latest entries, if `spike_score` is exceeded as well.
        spike_score: the distance of its logarithm from that median, in robust standard deviations
            (1.4826 times the median absolute deviation, plus 0.1).
        gradient_collapse: over time: report a gradient whose norm falls below this fraction of the
            median of its latest entries, compared with other gradients.

    Each rule looks at a single summary. To see changes between steps, record a `History`. The four
    gradient thresholds are at least ten times beyond the most extreme values measured in healthy
    trainings with AdamW and SGD: perceptrons, convolutional, recurrent and residual networks,
    GPT-2, Llama, BERT and ViT. There the norms of weights' gradients were between 2e-5 and 1e3
    times the median of the model, and between 2e-7 and 80 times the norm of the weight.
    tests/test_findings.py repeats some of these trainings.

    The thresholds after `sparse_weight` need `summarize(optimizer=...)` or `watch(optimizer=...)`.
    In small trainings like those above, an update was at most 0.01 times the larger one of the two
    norms with AdamW at a learning rate of 1e-3, 0.08 at 1e-2, 0.05 with SGD at 0.05, and in the
    first step 0.28 to 1 with AdamW at 0.1 or 1. With bfloat16 weights, AdamW at 1e-4 or more lost
    at most 72% of all updates, at 1e-5 74 to 99%; in float32, at most 41%. The lag was at most 8.
    After 200 steps, it was 11 when gradients grew by 1,000. Up to 38% of a weight were below eps;
    of a layer behind eight sigmoids, all of it. docs/findings.md has the table.
    """

    exploding_activation: float = 30.0
    vanishing_gradient: float = 1e-3
    largest_gradient_ratio: float = 1e3
    smallest_gradient_ratio: float = 1e-9
    largest_gain: float = 30.0
    overflow: float = 0.25
    underflow: float = 1.0
    sparse_weight: float = 0.9
    largest_update_ratio: float = 0.25
    lost_updates: float = 0.8
    largest_lag: float = 10.0
    below_eps: float = 0.5
    zero_rows: float = 0.5
    dead_units: float = 0.6
    equal_rows: float = 0.5
    heavy_tails: float = 1e3
    float8_underflow: float = 0.1
    largest_change: float = 0.2
    smallest_update: float = 1e-6
    weight_growth: float = 10.0
    weight_collapse: float = 0.1
    spike: float = 50.0
    spike_score: float = 6.0
    gradient_collapse: float = 1e-3

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
