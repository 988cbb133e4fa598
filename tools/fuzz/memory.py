"""Measures what every path of a call leaves behind: memory, references, cached layouts."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paramstats
from paramstats._core import backend as backends
from tools.fuzz.hostile import HostileError, Listing
from tools.fuzz.modules import BACKENDS

CALLS = 100_000
LEAST_CALLS = 400
"""Calls of a slow path: more than `MOST_BLOCKS`, so that a block left by every call is noticed."""
MOST_BLOCKS = 300
"""Blocks of Python's allocator that may remain after any number of calls."""
MOST_BYTES = 21
"""Bytes that may remain of each call ..."""
NOISE_BYTES = 1 << 18
"""... beyond the usual variation of a process's memory."""
_PAGE = 4096


@dataclasses.dataclass
class Growth:
    """What `calls` calls left behind."""

    path: str
    calls: int
    mebibytes: float
    blocks: int
    references: int
    layouts: int

    @property
    def grew(self) -> bool:
        allowed = max(NOISE_BYTES, MOST_BYTES * self.calls)
        memory = self.mebibytes * (1 << 20) > allowed or self.blocks > MOST_BLOCKS
        return memory or self.references != 0 or self.layouts != 0


class Model(nn.Sequential):
    """A few layers with gradients and buffers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        for p in self.parameters():
            p.grad = torch.ones_like(p)


def _paths(model: Model) -> dict[str, tuple[Callable[[], Any], int]]:
    """The calls by name, each with a divisor of the number of calls: larger for slow ones."""
    summarize = paramstats.summarize
    state = model.state_dict()
    pairs = list(model.named_parameters())
    summary = summarize(model)
    bad = nn.Module()
    bad._parameters["w"] = 3  # type: ignore[assignment]
    listing = Listing()
    listing.__dict__["listed"] = pairs
    cycle = nn.Sequential(nn.Linear(1, 1))
    cycle[0].parent = cycle
    native = BACKENDS[0].native
    sizes = iter(range(1 << 60))
    deferred = [torch.ones(2, dtype=torch.cfloat, requires_grad=True)]
    deferred[0].grad = torch.ones(2, dtype=torch.cfloat)
    plain = pairs[0][1]

    def raising(error: type[Exception], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def expect() -> None:
            with pytest.raises(error):
                call(*args, **kwargs)

        return expect

    def come_and_go() -> None:
        new = Model()
        summarize(new, buffers=True)
        summarize(new)
        alive = weakref.ref(new)
        del new
        assert alive() is None

    def through_a_class() -> None:
        class Own(nn.Module):
            def forward(self) -> Any:
                return own

        own = Own()
        own.weight = nn.Parameter(torch.ones(1))
        summarize(own)

    def unreadable() -> None:
        x = torch.ones(next(sizes) % 5000 + 1)
        x.untyped_storage().resize_(0)
        summarize({"x": x})

    def make_layout(*_: Any) -> Any:
        raise HostileError

    return {
        "a module": (lambda: summarize(model), 1),
        "gradients alone": (lambda: summarize(model, params=False), 1),
        "with buffers": (lambda: summarize(model, buffers=True), 1),
        "include and exclude": (lambda: summarize(model, include="w", exclude="^1"), 1),
        "a mapping": (lambda: summarize(state), 1),
        "pairs": (lambda: summarize(iter(pairs)), 1),
        "scalars": (lambda: summarize(model).scalars(), 2),
        "total": (lambda: summary.total.grad, 1),
        "to_dict": (lambda: summary.to_dict(), 10),
        "findings": (lambda: summarize(model).findings(), 10),
        "table": (lambda: summary.table(), 20),
        "pickled": (lambda: summary.__reduce__(), 1),
        "deferred rows": (lambda: native.read(deferred, True, True), 1),
        "metadata": (lambda: (native.metadata(plain), native.alias(plain)), 2),
        "bad pairs": (raising(TypeError, summarize, [*pairs, ("x", 3)]), 1),
        "bad arguments": (raising(ValueError, summarize, model, grad_scale=0), 1),
        "bad modules": (raising(TypeError, summarize, bad), 2),
        "modules that list their own parameters": (lambda: summarize(listing), 4),
        "cycles of modules": (lambda: summarize(cycle), 50),
        "layouts that raise": (
            raising(HostileError, native.walk, nn.Linear(1, 1), False, make_layout),
            4,
        ),
        "tensors that cannot be read": (unreadable, 4),
        "short-lived models": (come_and_go, 20),
        "models referenced by their class": (through_a_class, 50),
    }


def measure(path: str, call: Callable[[], Any], calls: int, model: Model) -> Growth:
    """Runs `calls` calls and returns what they left behind."""
    watched = [model, *model, *model.parameters(), *(p.grad for p in model.parameters())]
    watched += [m.__dict__ for m in model.modules()] + [m._parameters for m in model.modules()]
    watched += [Model, nn.Linear, torch.Tensor]
    native = BACKENDS[0].native

    def count() -> tuple[int, int, int, list[int]]:
        gc.collect()
        references = [sys.getrefcount(thing) for thing in watched]
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages, sys.getallocatedblocks(), native.cached_layouts(), references

    for _ in range(min(calls, 2000)):  # fills caches
        call()
    count()
    pages, blocks, layouts, references = count()
    for _ in range(calls):
        call()
    new_pages, new_blocks, new_layouts, new_references = count()
    return Growth(
        path,
        calls,
        round((new_pages - pages) * _PAGE / (1 << 20), 2),
        new_blocks - blocks,
        sum(abs(a - b) for a, b in zip(new_references, references, strict=True)),
        new_layouts - layouts,
    )


def run(calls: int) -> list[Growth]:
    """Measures every path with the native backend and one with the reference backend."""
    model = Model()
    growths = []
    before = backends.active()
    gc.collect()
    gc.freeze()  # collections need not visit what is there already
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backends._active = BACKENDS[0]
            for path, (call, divisor) in _paths(model).items():
                growths.append(measure(path, call, max(calls // divisor, LEAST_CALLS), model))
            backends._active = BACKENDS[1]
            call, _ = _paths(model)["scalars"]
            growths.append(measure("the reference backend", call, calls // 10, model))
    finally:
        backends._active = before
        gc.unfreeze()
    return growths


def in_a_child(calls: int) -> list[Growth]:
    """Runs `run` in a new process, whose memory no other work disturbs."""
    command = [sys.executable, "-m", "tools.fuzz.memory", str(calls)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [Growth(**growth) for growth in json.loads(output.splitlines()[-1])]


if __name__ == "__main__":
    print(json.dumps([dataclasses.asdict(growth) for growth in run(int(sys.argv[1]))]))
