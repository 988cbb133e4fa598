"""The engines of a device, and how to wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import paramstats


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
