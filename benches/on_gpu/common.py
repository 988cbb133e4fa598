"""The engines, the devices and the models of many small tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

import paramstats

WARM_UP = 5
"""Calls before one that counts."""


@contextmanager
def engine_of(name: str) -> Iterator[None]:
    """Has paramstats run on an engine."""
    before = paramstats.engine._engine
    paramstats.engine._engine = paramstats.engine.choose(name)
    try:
        yield
    finally:
        paramstats.engine._engine = before


def engines(device: torch.device) -> tuple[str, ...]:
    """The native one first, where it serves this device."""
    backend = paramstats.backend()
    here = backend.cuda if device.type == "cuda" else backend.cpu
    return ("native", "reference") if here == "native" else ("reference",)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
