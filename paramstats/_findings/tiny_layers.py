"""A rule about single weights that are so small that they stop the signal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from paramstats._core.format import number, one_line_name
from paramstats._findings.depth import Layer
from paramstats._findings.findings import Finding, FindingCode, Severity

_TINY_GAIN = 0.01
_FAINT, _FAINTER = 0.01, 0.03
"""The rms of a layer's input if the signal is lost; and as a fraction of that of the layer before.
"""


def tiny_layers(layers: Sequence[Layer]) -> Iterator[Finding]:
    """Report single weights that are so small that they stop the signal and the gradient.

    The input of the next layer and the gradients of layers before show it. A small weight at the
    end of a residual branch, of a LoRA adapter or of the model stops nothing.
    """
    for i, layer in enumerate(layers[:-1]):
        if layer.gain > _TINY_GAIN or layer.part.is_lookup or layer.part.is_tied:
            continue
        after = layers[i + 1]
        before = max((one.gradient for one in layers[:i]), default=0.0)
        is_stopped = before < _FAINTER * max(one.gradient for one in layers[i:])
        faint = _FAINT if math.isnan(layer.activation) else _FAINTER * layer.activation
        if not (is_stopped and after.activation < min(faint, _FAINT)):
            continue
        message = (
            f"std {number(layer.entry.value.rms)}, scales its input by {number(layer.gain)}; the "
            f"input of '{one_line_name(after.name)}' has an rms of about {number(after.activation)}"
        )
        advice = (
            "This weight is so small that it stops the signal, and the gradient on its way back. "
            "Initialize it with a std of about 1 / sqrt(fan-in): torch.nn.init.kaiming_normal_."
        )
        code, value = FindingCode.VANISHING_GRADIENT, layer.gain
        severity, name = Severity.WARNING, layer.name
        yield Finding(severity, code, name, "param", value, _TINY_GAIN, message, advice)
