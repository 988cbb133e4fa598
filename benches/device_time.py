"""The time that calls take on a GPU, by its own clock, without what the host does meanwhile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_ROUNDS = 15
_ROUND_SECONDS = 0.01
"""Of a round, about: many calls in a row, against the events' own cost."""

_LEAST_CALLS = 3
_MOST_CALLS = 50
_CYCLES = 2e9
"""In a second; faster than GPUs' clocks, so that a sleep is no shorter than asked for."""

_MOST_SLEEP = 0.05
"""Seconds; what queues for longer fills the queue anyhow."""


def device_seconds(call: Callable[[], Any]) -> float:
    """Of one call that queues work and does not wait; the median of several rounds.

    The GPU sleeps while a round is queued, so that it never waits for the host.
    """
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    queued = time.perf_counter() - begin
    torch.cuda.synchronize()
    done = time.perf_counter() - begin
    calls = min(max(round(_ROUND_SECONDS / done), _LEAST_CALLS), _MOST_CALLS)
    cycles = int(min(2 * calls * queued, _MOST_SLEEP) * _CYCLES)
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
