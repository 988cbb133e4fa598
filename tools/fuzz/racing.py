"""A model that another thread changes while it is summarised.

Every tensor is one number throughout, so that a statistic which mixes two, or memory that was let go,
shows. Left out: another thread that sets `.grad`, by itself or in backward, which crashes torch
itself where somebody reads it at that moment.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable

import torch
import torch.distributed.fsdp  # so that models are looked through for it
from torch import nn

import paramstats
from paramstats._core import backend as backends
from tools.fuzz.modules import ENGINES

NUMBERS = (1.0, -2.0, 3.0)
LARGE = 1 << 18  # beyond SERIAL_BYTES: the GIL is let go while it is read
REFUSED = (RuntimeError, KeyError, AttributeError, ValueError)
"""What torch's own listing raises at a dictionary that changes under it."""


def run(seed: int) -> int:
    """One case; returns its executions."""
    rng = random.Random(seed)
    torch.set_num_threads(rng.randrange(1, 4))
    size = LARGE if rng.random() < 0.1 else 5
    model = nn.Sequential(*(_layer(rng, size) for _ in range(rng.randrange(1, 12))))
    native = rng.random() < 0.8
    backends._active = ENGINES[not native]
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
        backends._active = ENGINES[0]
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
        held = layer()._parameters.get("w")
        if held is not None:
            held.data = new().data

    def extra() -> None:
        layer()._parameters[f"p{rng.randrange(9)}"] = rng.choice((None, new()))

    def clear() -> None:
        layer()._parameters.clear()

    changes = (add, add, remove, replace, swap, swap, extra, clear)

    def change() -> None:
        rng.choice(changes)()

    return change


def _call(model: nn.Module, native: bool) -> None:
    try:
        summary = paramstats.summarize(model)
    except REFUSED:
        assert not native  # the walk of the native backend sees one moment
        return
    assert len(set(summary)) == len(summary)
    for entry in summary.values():
        for stats in (entry, entry.grad):
            if stats is not None and stats.count:
                assert stats.min == stats.max == stats.mean and stats.std == 0, stats
                assert stats.mean in NUMBERS, stats
