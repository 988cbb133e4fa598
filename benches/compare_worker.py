"""The half of benches.compare that runs once in each tree: calls of paramstats, timed when asked.

It reads commands from stdin, one JSON object a line, and answers each with one. It needs nothing of
the tree but the package: what is compared may be older than this file.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import paramstats

_SIZES = {"32 KB": 32_000, "1 MB": 1_000_000, "32 MB": 32_000_000, "256 MB": 256_000_000}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_TURN_SECONDS = 0.03
_WARM_SECONDS = 0.005
"""At the start of a turn, when the other worker's threads may be awake and its data in cache."""

_ROUNDS = 7
"""Of a turn, whose statistic is their median: one interrupt makes none."""


def _tiny_mlp() -> Any:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model(torch.rand(32, 64)).square().mean().backward()
    return model


def _small_tensors() -> Any:
    """A step changes gradients, and the model's layout is remembered: parameters with gradients."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(250)))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def _one_tensor(size: str, dtype: str) -> Callable[[], Any]:
    numel = _SIZES[size] // _DTYPES[dtype].itemsize
    return lambda: {"x": torch.empty(numel, dtype=_DTYPES[dtype]).normal_()}


_SHARED = ("32 MB", "256 MB")
"""Sizes that are worth a second thread; smaller ones stay on the caller's."""

CASES: dict[str, tuple[Callable[[], Any], int]] = {
    "tiny MLP": (_tiny_mlp, 1),
    "1,000 small tensors": (_small_tensors, 1),
    **{
        f"{size} of {dtype}, {threads} thread{'s' if threads > 1 else ''}": (
            _one_tensor(size, dtype),
            threads,
        )
        for size in _SIZES
        for dtype in _DTYPES
        for threads in ((1, 2) if size in _SHARED else (1,))
    },
}
"""What is summarised, and torch's threads."""


class Worker:
    """One case at a time."""

    def __init__(self) -> None:
        self._source: Any = None
        self._iterations = 1

    def build(self, case: str) -> dict[str, Any]:
        """The total's statistics, for both trees must find the same."""
        self._source = None  # before the next one is made
        build, threads = CASES[case]
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        self._source = build()
        total = paramstats.summarize(self._source).total
        begin = time.perf_counter()
        calls = 0
        while (seconds := time.perf_counter() - begin) < _TURN_SECONDS:
            paramstats.summarize(self._source)
            calls += 1
        self._iterations = max(1, round(_TURN_SECONDS / _ROUNDS / (seconds / calls)))
        shares = [total.mean / total.rms, total.std / total.rms, total.zero_fraction]
        return {"statistics": [*shares, total.rms, total.min, total.max]}

    def turn(self) -> dict[str, Any]:
        """Seconds a call."""
        end = time.perf_counter() + _WARM_SECONDS
        while time.perf_counter() < end:
            paramstats.summarize(self._source)
        return {"seconds": statistics.median(self._round() for _ in range(_ROUNDS))}

    def _round(self) -> float:
        source, calls = self._source, range(self._iterations)
        begin = time.perf_counter()
        for _ in calls:
            paramstats.summarize(source)
        return (time.perf_counter() - begin) / self._iterations


def main() -> None:
    backend = paramstats.backend()
    print(json.dumps({"package": str(Path(paramstats.__file__).parent), "backend": backend.cpu}))
    sys.stdout.flush()
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        answer = worker.build(command["build"]) if "build" in command else worker.turn()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
