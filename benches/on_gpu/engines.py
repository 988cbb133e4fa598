"""The backends of a device, and how to wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import paramstats


@contextmanager
def engine_of(name: str) -> Iterator[None]:
    """Has paramstats run on an backend."""
    before = paramstats._core.backend._active
    paramstats._core.backend._active = paramstats._core.backend.choose(name)
    try:
        yield
    finally:
        paramstats._core.backend._active = before


def backends(device: torch.device) -> tuple[str, ...]:
    """The native one first, where it serves this device."""
    backend = paramstats.backend()
    here = backend.cuda if device.type == "cuda" else backend.cpu
    return ("native", "reference") if here == "native" else ("reference",)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
