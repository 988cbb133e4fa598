"""Random trees of modules and the ways in which a case damages them."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from tools.fuzz.hostile import (
    CLASSES,
    AllEqual,
    Colliding,
    Finalized,
    Intercepting,
    Listing,
    Lying,
    LyingDict,
    Pretender,
    RaisingDict,
    Recursing,
    Rewriting,
    Text,
    Unhashable,
)

THRESHOLDS = gc.get_threshold()
KEYS = ("w", "b", "", "a.b", "ü", "\n", "\0", "\ud800", "x" * 200, "self", "0", "weight")


class Case:
    """A random tree of modules that follows from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.root = nn.Module()
        self.modules: list[nn.Module] = [self.root]
        self.is_armed = self.is_mined = False
        self.threshold = 0
        self.finalizers: list[Finalized] = []
        self.many_paths = False
        for _ in range(self.rng.randrange(1, 9)):
            self.grow()

    def module(self) -> nn.Module:
        return self.rng.choice(self.modules)

    def tensor(self) -> torch.Tensor:
        x = torch.full((self.rng.randrange(4),), float(self.rng.randrange(-2, 3)))
        return nn.Parameter(x) if self.rng.random() < 0.8 else x

    def key(self) -> str:
        return self.rng.choice(KEYS) if self.rng.random() < 0.3 else f"k{self.rng.randrange(99)}"

    def grow(self) -> None:
        kind = self.rng.randrange(5)
        new: nn.Module = nn.Module()
        if kind == 0:
            new = nn.Linear(2, 1)
        elif kind == 1:
            new = nn.BatchNorm1d(2)
        if kind > 2:
            dictionary(self.module(), "_parameters")[self.key()] = self.tensor()
        else:
            dictionary(self.module(), "_modules")[self.key()] = new
            self.modules.append(new)

    def arm(self) -> bool:
        """Enables `strike` for one call; returns False where nothing will call it."""
        self.is_armed = self.is_mined or bool(self.finalizers)
        if self.finalizers:
            gc.disable()
            self.finalizers.clear()
            gc.set_threshold(self.threshold, 10, 10)
            gc.enable()
        return self.is_armed

    def disarm(self) -> None:
        gc.set_threshold(*THRESHOLDS)
        self.is_armed = False

    def strike(self) -> None:
        """Empties the tree and reuses its memory, if enabled."""
        if not self.is_armed:
            return
        self.is_armed = False
        self.empty()
        self.junk = [torch.ones(3) for _ in range(30)]

    def empty(self) -> None:
        for module in self.modules:
            for name in ("_parameters", "_buffers", "_modules"):
                entries = module.__dict__.get(name)
                if type(entries) is dict:
                    entries.clear()


def dictionary(module: nn.Module, name: str) -> Any:
    entries = module.__dict__.get(name)
    return entries if type(entries) is dict else {}


def none_entries(case: Case) -> None:
    dictionary(case.module(), case.rng.choice(("_parameters", "_modules", "_buffers")))["n"] = None


def odd_keys(case: Case) -> None:
    key = case.rng.choice((Text("t"), Rewriting("r"), 3, None, (1,), b"b", 2.5))
    dictionary(case.module(), case.rng.choice(("_parameters", "_modules")))[key] = case.rng.choice(
        (None, case.tensor())
    )


def odd_children(case: Case) -> None:
    children: list[Any] = [3, "x", nn.Linear, torch.ones(2), object(), Pretender(), None, len]
    dictionary(case.module(), "_modules")["odd"] = case.rng.choice(children)


def odd_parameters(case: Case) -> None:
    values: list[Any] = [3, "x", nn.Linear, object(), nn.Linear(1, 1), [torch.ones(1)], Pretender()]
    dictionary(case.module(), "_parameters")["odd"] = case.rng.choice(values)


def another_mapping(case: Case) -> None:
    name = case.rng.choice(("_parameters", "_modules", "_buffers"))
    module = case.module()
    entries = dictionary(module, name)
    classes = (OrderedDict, LyingDict, RaisingDict, types.MappingProxyType, list, dict)
    values = [make(entries) for make in classes]
    module.__dict__[name] = case.rng.choice([*values, None, 3, {}])


def deleted_mapping(case: Case) -> None:
    case.module().__dict__.pop(case.rng.choice(("_parameters", "_modules", "_buffers")), None)


def odd_class(case: Case) -> None:
    new = case.rng.choice(CLASSES)()
    dictionary(case.module(), "_modules")[case.key()] = new
    new.__dict__.get("_parameters", {})["own"] = case.tensor()
    case.modules.append(new)


def changed_class(case: Case) -> None:
    module = case.module()
    if type(module) is nn.Module:
        module.__class__ = case.rng.choice((Unhashable, Lying, AllEqual, Listing, Intercepting))


def shared(case: Case) -> None:
    dictionary(case.module(), "_modules")["shared"] = case.module()  # may make a cycle
    own = dictionary(case.module(), "_parameters")
    dictionary(case.module(), "_parameters").update({f"{k}_": v for k, v in own.items()})


def colliding(case: Case) -> None:
    """Adds a colliding attribute before all others, so that lookups compare with it."""
    module = case.module()
    case.is_mined = True
    own = dict(module.__dict__)
    module.__dict__.clear()
    module.__dict__[Colliding(case)] = 1  # type: ignore[index]
    module.__dict__.update(own)


def finalized(case: Case) -> None:
    """Modules whose `__dict__` does not exist yet; creating it starts the garbage collector."""
    for _ in range(10):
        fresh = type("Fresh", (nn.Module,), {}) if case.rng.random() < 0.02 else nn.Module
        dictionary(case.root, "_modules")[f"f{case.rng.randrange(99)}"] = fresh()
    case.threshold = case.rng.randrange(1, 30)
    case.finalizers.append(Finalized(case))


def overridden(case: Case) -> None:
    module = case.module()
    tensor = case.tensor()
    listed: list[Any] = [[("only", tensor)], [], [(3, tensor)], [("a", 3)], [("a",)], [tensor],
                         [("same", tensor), ("same", tensor)],
                         [("x", tensor), ("x", case.tensor())], 3, None]  # fmt: skip
    chosen = case.rng.choice(listed)
    name = case.rng.choice(("named_parameters", "named_buffers", "parameters"))
    module.__dict__[name] = lambda *a, **k: chosen


def listing(case: Case) -> None:
    new = case.rng.choice((Listing, Recursing))()
    new.__dict__["listed"] = [("mine", case.tensor())]
    dictionary(case.module(), "_modules")["listing"] = new
    case.modules.append(new)
    if case.rng.random() < 0.5:
        case.root = new


def lazy(case: Case) -> None:
    new = case.rng.choice((lambda: nn.LazyLinear(2), lambda: nn.LazyBatchNorm1d()))()
    dictionary(case.module(), "_modules")["lazy"] = new
    case.modules.append(new)


def parametrized(case: Case) -> None:
    new = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    dictionary(case.module(), "_modules")["parametrized"] = new


def copied(case: Case) -> None:
    case.root = copy.deepcopy(case.root)
    case.modules = [case.root]


def pickled(case: Case) -> None:
    case.root = pickle.loads(pickle.dumps(case.root))
    case.modules = [case.root]


def gradients(case: Case) -> None:
    for module in case.modules:
        for tensor in dictionary(module, "_parameters").values():
            if type(tensor) is nn.Parameter and not nn.parameter.is_lazy(tensor):
                tensor.grad = torch.full_like(tensor, 2.0)


def swapped(case: Case) -> None:
    module = case.module()
    for name, tensor in list(dictionary(module, "_parameters").items()):
        if type(tensor) is nn.Parameter and not nn.parameter.is_lazy(tensor):
            if case.rng.random() < 0.5:
                tensor.data = torch.ones(case.rng.randrange(5), dtype=torch.float32)
            else:
                dictionary(module, "_parameters")[name] = nn.Parameter(torch.ones(2))


def moved(case: Case) -> None:
    entries = dictionary(case.module(), "_parameters")
    if entries:
        key = next(iter(entries))
        entries[key] = entries.pop(key)
    if case.rng.random() < 0.3:
        entries.clear()


def flat(case: Case) -> None:
    wide = nn.Module()
    one = nn.Linear(1, 1)
    count = 20_000 if case.rng.random() < 0.01 else case.rng.randrange(200)
    for i in range(count):
        wide._modules[str(i)] = one if i % 3 else nn.Module()
    case.root._modules["wide"] = wide


def deep(case: Case) -> None:
    depth = case.rng.choice((100, 300, 2000))
    if case.rng.random() < 0.95:
        depth = 20
    module: nn.Module = case.root
    for _ in range(depth):
        outer = nn.Module()
        outer._modules["d"] = module
        module = outer
    case.root = module


def doubling(case: Case) -> None:
    """Adds 2^n paths to one module."""
    module: nn.Module = nn.Linear(1, 1)
    case.many_paths = True
    for _ in range(22 if case.rng.random() < 0.05 else 5):
        outer = nn.Module()
        outer._modules.update({"l": module, "r": module})
        module = outer
    case.root._modules["double"] = module


RARE = (flat, deep, doubling, parametrized, copied, pickled)
COMMON = (
    none_entries, odd_keys, odd_children, odd_parameters, another_mapping, deleted_mapping,
    odd_class, changed_class, shared, colliding, finalized, overridden, listing, lazy, gradients,
    swapped, moved, Case.grow,
)  # fmt: skip
