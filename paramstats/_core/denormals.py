"""Keep subnormal numbers, which torch.set_flush_denormal(True) turns into zeros.

That mode belongs to a thread. Threads that it starts inherit it, and keep it when it is turned off.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from paramstats._core.forked import OneThread

F = TypeVar("F", bound=Callable[..., object])

_SMALLEST_NORMAL = sys.float_info.min

_SERIAL = 1 << 15
"""Elements up to which torch's operators on dense tensors use one thread."""

_ELEMENTS_PER_THREAD = 200
"""torch.bucketize uses another thread for every 200 elements, fewer than any other operator."""


def flushes_denormals() -> bool:
    """Return whether this thread takes subnormal numbers as zero."""
    return _SMALLEST_NORMAL * 0.5 == 0


def with_denormals(function: F) -> F:
    """Make a function of numbers keep subnormal ones, as WithDenormals in csrc/cpu/denormals.h."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not flushes_denormals():
            return function(*args, **kwargs)
        torch.set_flush_denormal(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_flush_denormal(True)

    return wrapper  # type: ignore[return-value]


def threads_with_denormals(numel: int) -> OneThread:
    """Restrict torch to the calling thread if one of its other threads flushes to zero.

    `numel` is that of the largest tensor; few elements need no other threads.
    """
    return OneThread(numel > _SERIAL and _threads_flush())


def _threads_flush() -> bool:
    """Return whether one of torch's threads takes subnormal numbers as zero."""
    n = _ELEMENTS_PER_THREAD * torch.get_num_threads()
    subnormal = torch.ones(n, dtype=torch.int64, device="cpu").view(torch.float64)
    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
    return int(torch.bucketize(subnormal, zero).sum()) < n
