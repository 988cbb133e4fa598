"""The host's time for a call over small tensors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import paramstats
from benches import models
from benches.on_gpu.backends import backends, engine_of, synchronize
from benches.on_gpu.small_tensors import CASES, WARM_UP, small_tensors

TENSORS = 1000
MUST = 150e-6
AIM = 60e-6
"""Seconds of the host for a call of the native backend over so many small tensors."""

_FEW_CALLS = 10
"""Of the reference backend, which launches some thirty kernels for each tensor."""

_BUSY_SECONDS = 0.02
_CYCLES = 2e9
"""In a second; faster than GPUs' clocks, so that they are busy for no less than was asked."""


@dataclass(frozen=True)
class HostTime:
    """Seconds until a call returns, and until its statistics are here."""

    case: str
    backend: str
    tensors: int
    calls: int
    median_s: float
    tenth_s: float
    ninetieth_s: float
    busy_s: float | None
    """The median while the device has 20 ms of other work to do first; None on a CPU."""
    complete_s: float
    """The median until the statistics could be read."""
    must_s: float | None
    aim_s: float | None


def host_time(
    model: nn.Module, case: str, backend: str, calls: int, device: torch.device
) -> HostTime:
    """Nothing is waited for while the clock runs; the queue is empty when it starts."""
    with engine_of(backend):
        for _ in range(WARM_UP):
            paramstats.summarize(model).wait()
        returned, complete = _timed_calls(model, calls, device, lambda: None)
        busy = None
        if device.type == "cuda":
            few = max(WARM_UP, calls // 10)
            busy = statistics.median(_timed_calls(model, few, device, _keep_busy)[0])
        deciles = statistics.quantiles(returned, n=10)
    tensors = len(models.tensors(model))
    has_targets = backend == "native" and tensors == TENSORS
    return HostTime(
        case=case,
        backend=backend,
        tensors=tensors,
        calls=calls,
        median_s=statistics.median(returned),
        tenth_s=deciles[0],
        ninetieth_s=deciles[-1],
        busy_s=busy,
        complete_s=statistics.median(complete),
        must_s=MUST if has_targets else None,
        aim_s=AIM if has_targets else None,
    )


def _timed_calls(
    model: nn.Module, calls: int, device: torch.device, before: Callable[[], None]
) -> tuple[list[float], list[float]]:
    returned, complete = [], []
    for _ in range(calls):
        synchronize(device)
        before()
        begin = time.perf_counter()
        summary = paramstats.summarize(model)
        returned.append(time.perf_counter() - begin)
        summary.wait()
        complete.append(time.perf_counter() - begin)
    return returned, complete


def _keep_busy() -> None:
    torch.cuda._sleep(int(_BUSY_SECONDS * _CYCLES))


def measure(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    calls = 100 if quick else 1000
    found = []
    for backend in backends(device):
        some = calls if backend == "native" else _FEW_CALLS
        for case, arguments in CASES.items():
            model = small_tensors(*arguments, device)
            found.append(asdict(host_time(model, case, backend, some, device)))
    return found


def lines(row: dict[str, Any]) -> Iterator[str]:
    busy = "" if row["busy_s"] is None else f", {row['busy_s'] * 1e6:.1f} us while busy"
    targets = (
        f"; must {row['must_s'] * 1e6:.0f} us, aim {row['aim_s'] * 1e6:.0f} us"
        if row["must_s"]
        else ""
    )
    yield (
        f"host time, {row['backend']}, {row['case']}: {row['median_s'] * 1e6:.1f} us"
        f"{busy}, complete after {row['complete_s'] * 1e6:.1f} us{targets}"
    )
