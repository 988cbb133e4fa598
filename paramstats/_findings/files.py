"""Advice on findings in checkpoint files, which cannot be fixed by another learning rate."""

from __future__ import annotations

import dataclasses
import re

from paramstats._core.record import FileSource
from paramstats._findings.findings import Finding, FindingCode

_ADVICE = {
    FindingCode.NONFINITE_PARAMETER: "The file contains NaN or infinite weights. Use an earlier "
    "checkpoint, and look for the first step with NaN in the training.",
    FindingCode.ZERO_WEIGHT: "All elements are zero, so this layer outputs at most its bias. The "
    "weight was never trained, was pruned, or was lost when the file was saved or converted.",
    FindingCode.CONSTANT_WEIGHT: "All units of this layer compute the same. The weight was not "
    "initialized randomly, or was lost when the file was saved or converted.",
    FindingCode.HUGE_WEIGHT: "Trained weights keep the scale of their input: a std of about "
    "1 / sqrt(fan-in). This one diverged in the training, or lacks the scale of a quantized "
    "weight. Compare it with an earlier checkpoint.",
    FindingCode.OVERFLOW: "Values are close to the maximum of the dtype, and larger ones became "
    "infinite. Save the weights in bfloat16 or float32.",
    FindingCode.UNDERFLOW: "Values are too small for the dtype and have lost digits. Save the "
    "weights in a wider dtype.",
}
_OUTSIDE_MODEL = {
    "optimizer": "The optimizer's state contains NaN, which makes weights NaN at the next step. "
    "Resume from an earlier checkpoint.",
    "other": "These values contain NaN. They are not weights of the model; check what uses them.",
}
_UNTRAINED = (
    "LoRA starts with this weight at zero. The adapter is untrained here and does not change the "
    "model."
)
_LORA_B = re.compile(r"lora_(?:up|b)\b|lora_(?:up|b)_", re.IGNORECASE)


def advise_on_file(finding: Finding, file: FileSource) -> Finding:
    """Return a finding in a file, with advice for somebody who has the file, not the training."""
    advice = _ADVICE.get(finding.code, finding.advice)
    group = file.groups.get(finding.name, "model")
    if group != "model":
        advice = _OUTSIDE_MODEL[group]
    elif finding.code == FindingCode.ZERO_WEIGHT and _LORA_B.search(finding.name):
        advice = _UNTRAINED
    return dataclasses.replace(finding, advice=advice)
