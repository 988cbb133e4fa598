"""Helpers for timing: the backend, quartiles, the GPU's clock, torch.compile with a time limit."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch

import paramstats
from paramstats._core import backend as backends
from paramstats._core import images
from tests.fake_device import scaled

CYCLES_PER_SECOND = 2e9
"""At least the clock rate of any GPU, so that `torch.cuda._sleep` is never too short."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make paramstats use a backend. Raises RuntimeError if that backend is not available."""
    before = backends._active
    backends._active = backends.choose(name)
    try:
        yield
    finally:
        backends._active = before


def available_backends(device: torch.device) -> tuple[str, ...]:
    """Return the backends that read tensors of a device, the native one first."""
    found = paramstats.backend()
    native = (found.cuda if device.type == "cuda" else found.cpu) == "native"
    return ("native", "reference") if native else ("reference",)


def start_cuda() -> None:
    """Initialize CUDA and wait until the kernels are compiled if the package has no cubins.

    `paramstats.backend()` does neither, and no reader of a benchmark expects torch operators.
    """
    images.find(torch.cuda.get_device_capability(), wait=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the limits of the middle half of the values."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


# ---- time on the GPU ----------------------------------------------------------------------------

_ROUNDS = scaled(15, 2)
_ROUND_SECONDS = 0.01
"""A round contains enough calls to last about this long, so that the events cost little."""

_LEAST_CALLS, _MOST_CALLS = scaled(3, 1), scaled(50, 1)
_MOST_SLEEP = 0.05


def device_seconds(call: Callable[[], Any]) -> float:
    """Return the GPU time of a call that queues work without waiting: the median of 15 rounds.

    The GPU sleeps while the host queues the calls of a round, so that it never waits for the host.
    """
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    queued = time.perf_counter() - begin
    torch.cuda.synchronize()
    done = time.perf_counter() - begin
    calls = min(max(round(_ROUND_SECONDS / done), _LEAST_CALLS), _MOST_CALLS)
    cycles = int(min(2 * calls * queued, _MOST_SLEEP) * CYCLES_PER_SECOND)
    return statistics.median(_round(call, calls, cycles) for _ in range(_ROUNDS)) / calls


def _round(call: Callable[[], Any], calls: int, cycles: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


# ---- torch.compile ------------------------------------------------------------------------------


class TooLongError(BaseException):
    """Not an Exception, because torch's compiler catches those."""


def why_not_compiled(call: Callable[[], Any], seconds: float) -> str | None:
    """Call once to compile `call`. Return the reason if that fails or takes too long."""
    torch.compiler.reset()  # the number of graphs is limited
    try:
        with _time_limit(seconds):
            call()
    except TooLongError:
        torch.compiler.reset()
        with suppress(Exception):  # stop torch's compiler processes, by a private function
            from torch._inductor.async_compile import shutdown_compile_workers

            shutdown_compile_workers()
        return f"torch.compile took more than {seconds:.1f} s"
    except Exception as error:  # from torch, the C++ compiler or Triton
        text = " ".join(str(error).split())[:200]
        return f"torch.compile failed ({type(error).__name__}: {text})"
    return None


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
