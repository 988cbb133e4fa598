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
        exploding_activation: report a model with gradients of more than 10 times the weight, if the
            estimated rms of the last layer's input is more than this, and more than this many times
            that of the first, and the gains of the weights explain it. Pascanu, Mikolov, Bengio
            2013 describe the problem. Healthy: at most 9, or 220 that gains do not explain; in 20
            layers of gain 1.5: 250 to 500.
        vanishing_gradient: report weights whose relative gradient (norm / norm of the weight) is
            less than this fraction of the largest one, if it falls towards the input in 4 steps or
            more, in all by more. Glorot, Bengio 2010: all layers should have gradients of similar
            size. Healthy: 3e-3 in so many steps; with 8 sigmoid layers: 1e-6.
        largest_gradient_ratio: report a weight's gradient whose norm is more than this many times
            the norm of the weight, or of a new weight of its shape. With plain SGD at a learning
            rate of 1e-3, one step would replace such a weight. Sums instead of means reach 1e3.
        smallest_gradient_ratio: report a weight's gradient whose norm is less than this fraction
            of the norm of the weight. Plain SGD adds it to a float32 weight, whose precision is
            6e-8 (24 bits), so that rounding removes the update.
        largest_gain: report a weight that scales its input by more than this: rms * sqrt(fan-in),
            if its rms is above 2. Initializers give 0.1 to 1.4 (He et al. 2015: sqrt(2)). Healthy:
            at most 8, embeddings excluded; a std of 5 before tanh: 40.
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
        zero_rows: report a weight of whose rows more than this fraction are zero.
        dead_units: report a weight of whose units more than this fraction have a gradient of zero.
            Healthy: up to 0.6 in a batch of 32 to 64.
        equal_rows: report a weight of whose rows more than this fraction equal another one.
        heavy_tails: report a larger kurtosis, the fourth standardized moment. It is 3 for a normal
            distribution. Healthy: at most 250, embeddings excluded.
        low_precision: report a weight or gradient of whose elements more than this fraction
            become 0 in float8_e4m3fn or float8_e5m2, with one scale for the tensor. Healthy: at
            most 0.03.
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

    Rules look at a single summary, those over time at the entries of a history. "Healthy" is the
    most extreme value in about 120 trainings of perceptrons, convolutional, recurrent and residual
    networks, language and vision transformers; see docs/findings.md, also for the thresholds that
    need `optimizer=...`.
    """

    exploding_activation: float = 30.0
    vanishing_gradient: float = 3e-4
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
    low_precision: float = 0.1
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
