"""Models of many small tensors, whose call costs more than their reading."""

from __future__ import annotations

import torch
from torch import nn

WARM_UP = 5
"""Calls before one that counts."""


def small_tensors(layers: int, gradients: bool, device: torch.device) -> nn.Module:
    """Two parameters a layer, of 256 and 16 elements."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers))).to(device)
    if gradients:
        for p in model.parameters():
            p.grad = torch.randn_like(p)
    return model


CASES = {
    "1,000 parameters, no gradients": (500, False),
    "500 parameters and their gradients": (250, True),
    "1,000 parameters and their gradients": (500, True),
}
"""Arguments of `small_tensors` by name."""
