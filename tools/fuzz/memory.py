"""Nothing grows from call to call: memory, reference counts, caches; on every path of a call."""

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

import torch
from torch import nn

import paramstats
from paramstats._core import backend as backends
from tools.fuzz.hostile import HostileError, Listing
from tools.fuzz.modules import ENGINES

CALLS = 100_000
LEAST_CALLS = 400
"""Of a path that takes long: more than MOST_BLOCKS, so that a block left by each shows."""
MOST_BLOCKS = 300
"""Blocks of Python's allocator that may stay, whatever the calls: dictionaries of others grow."""
MOST_BYTES = 21
"""That may stay of a call, where there are enough of them ..."""
NOISE_BYTES = 1 << 18
"""... to be more than what the memory differs by anyway."""
_PAGE = 4096


@dataclasses.dataclass
class Growth:
    """What is more after the calls than before."""

    path: str
    calls: int
    mebibytes: float
    blocks: int
    references: int
    layouts: int

    @property
    def grew(self) -> bool:
        most = max(NOISE_BYTES, MOST_BYTES * self.calls)
        much = self.mebibytes * (1 << 20) > most or self.blocks > MOST_BLOCKS
        return much or self.references != 0 or self.layouts != 0


class Model(nn.Sequential):
    """A few layers with gradients and buffers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        for p in self.parameters():
            p.grad = torch.ones_like(p)


def _raising(call: Callable[[], Any], *errors: type[Exception]) -> Callable[[], None]:
    def raises() -> None:
        try:
            call()
        except errors:
            return
        raise AssertionError("nothing was raised")

    return raises


def _paths(model: Model) -> dict[str, tuple[Callable[[], Any], int]]:
    """What is called, and how many times less often, as it takes longer."""
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
    native = ENGINES[0].native
    sizes = iter(range(1 << 60))

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

    def hostile_layout() -> None:
        def make(*_: Any) -> Any:
            raise HostileError

        native.walk(nn.Linear(1, 1), False, make)

    return {
        "a module": (lambda: summarize(model), 1),
        "its gradients": (lambda: summarize(model, params=False), 1),
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
        "bad pairs": (_raising(lambda: summarize([*pairs, ("x", 3)]), TypeError), 1),
        "bad arguments": (_raising(lambda: summarize(model, grad_scale=0), ValueError), 1),
        "bad modules": (_raising(lambda: summarize(bad), TypeError), 2),
        "modules that list themselves": (lambda: summarize(listing), 4),
        "cycles of modules": (lambda: summarize(cycle), 50),
        "layouts that raise": (_raising(hostile_layout, HostileError), 4),
        "tensors that cannot be read": (unreadable, 4),
        "models that come and go": (come_and_go, 20),
        "models that their class knows": (through_a_class, 50),
    }


def measured(path: str, call: Callable[[], Any], calls: int, model: Model) -> Growth:
    """What `calls` calls leave behind."""
    held = [model, *model, *model.parameters(), *(p.grad for p in model.parameters())]
    held += [m.__dict__ for m in model.modules()] + [m._parameters for m in model.modules()]
    held += [Model, nn.Linear, torch.Tensor]
    native = ENGINES[0].native
    for _ in range(min(calls, 2000)):  # what is made once is there
        call()
    before, after = [0] * len(held), [0] * len(held)
    numbers = []
    for counts in (before, after):
        gc.collect()
        for i, thing in enumerate(held):
            counts[i] = sys.getrefcount(thing)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        numbers.append((pages, sys.getallocatedblocks(), native.cached_layouts()))
        if counts is before:
            for _ in range(calls):
                call()
    (pages, blocks, layouts), (more_pages, more_blocks, more_layouts) = numbers
    return Growth(
        path,
        calls,
        (more_pages - pages) * _PAGE / (1 << 20),
        more_blocks - blocks,
        sum(abs(a - b) for a, b in zip(after, before, strict=True)),
        more_layouts - layouts,
    )


def run(calls: int) -> list[Growth]:
    """Every path with the native backend, and the first with the other one."""
    model = Model()
    growths = []
    before = backends.active()
    gc.collect()
    gc.freeze()  # what is there already need not be looked at again and again
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backends._active = ENGINES[0]
            for path, (call, less) in _paths(model).items():
                growths.append(measured(path, call, max(calls // less, LEAST_CALLS), model))
            backends._active = ENGINES[1]
            call, _ = _paths(model)["scalars"]
            growths.append(measured("the reference backend", call, calls // 10, model))
    finally:
        backends._active = before
        gc.unfreeze()
    return growths


def in_a_child(calls: int) -> list[Growth]:
    """The same in a process that has done nothing else."""
    command = [sys.executable, "-m", "tools.fuzz.memory", str(calls)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [Growth(**growth) for growth in json.loads(output.splitlines()[-1])]


if __name__ == "__main__":
    print(json.dumps([dataclasses.asdict(growth) for growth in run(int(sys.argv[1]))]))
