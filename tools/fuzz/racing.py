"""`summarize` of a model while two other threads change it.

All elements of a tensor are equal, so that statistics of mixed or freed memory are noticed. No
thread sets `.grad`: torch itself crashes where one thread sets it and another reads it.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable

import torch
import torch.distributed.fsdp  # from now on `summarize` searches models for FSDP modules
from torch import nn

import paramstats
from paramstats._core import backend as backends
from tools.fuzz.modules import BACKENDS

NUMBERS = (1.0, -2.0, 3.0)
LARGE = 1 << 18  # beyond SERIAL_BYTES: the read releases the GIL
REFUSED = (RuntimeError, KeyError, AttributeError, ValueError)
"""Exceptions of torch's own listing while another thread changes a dictionary."""


def run(seed: int) -> int:
    """Runs one case; returns its executions."""
    rng = random.Random(seed)
    torch.set_num_threads(rng.randrange(1, 4))
    size = LARGE if rng.random() < 0.1 else 5
    model = nn.Sequential(*(_layer(rng, size) for _ in range(rng.randrange(1, 12))))
    native = rng.random() < 0.8
    backends._active = BACKENDS[not native]
    stop = threading.Event()
    changes = [_change(random.Random(seed + i + 1), model, size) for i in range(2)]
    threads = [threading.Thread(target=_until, args=(stop, change)) for change in changes]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    executions = 10 if size == LARGE else 100
    try:
        for thread in threads:
            thread.start()
        for _ in range(executions):
            _call(model, native)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
        backends._active = BACKENDS[0]
    return executions


def _layer(rng: random.Random, size: int) -> nn.Module:
    layer = nn.Module()
    layer.w = _parameter(rng, size)
    return layer


def _parameter(rng: random.Random, size: int) -> nn.Parameter:
    parameter = nn.Parameter(torch.full((size,), rng.choice(NUMBERS)))
    if rng.random() < 0.5:
        parameter.grad = torch.full((size,), rng.choice(NUMBERS))
    return parameter


def _until(stop: threading.Event, change: Callable[[], None]) -> None:
    while not stop.is_set():
        change()


def _change(rng: random.Random, model: nn.Sequential, size: int) -> Callable[[], None]:
    def new() -> nn.Parameter:
        return _parameter(rng, size)

    def layer() -> nn.Module:
        return rng.choice(list(model._modules.values()) or [nn.Module()])

    def add() -> None:
        if len(model._modules) < 30:
            model._modules[f"m{rng.randrange(40)}"] = _layer(rng, size)

    def remove() -> None:
        if len(model._modules) > 1:
            model._modules.pop(rng.choice(list(model._modules)), None)

    def replace() -> None:
        layer()._parameters["w"] = new()

    def swap() -> None:
        parameter = layer()._parameters.get("w")
        if parameter is not None:
            parameter.data = new().data

    def add_parameter() -> None:
        layer()._parameters[f"p{rng.randrange(9)}"] = rng.choice((None, new()))

    def clear() -> None:
        layer()._parameters.clear()

    changes = (add, add, remove, replace, swap, swap, add_parameter, clear)

    def change() -> None:
        rng.choice(changes)()

    return change


def _call(model: nn.Module, native: bool) -> None:
    try:
        summary = paramstats.summarize(model)
    except REFUSED:
        assert not native  # the native walk holds the GIL, so nothing changes meanwhile
        return
    assert len(set(summary)) == len(summary)
    for entry in summary.values():
        for stats in (entry, entry.grad):
            if stats is not None and stats.count:
                assert stats.min == stats.max == stats.mean and stats.std == 0, stats
                assert stats.mean in NUMBERS, stats
