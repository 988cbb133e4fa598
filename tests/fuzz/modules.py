"""HostileError modules for `summarize` and the walk: what torch lists, or an exception.

A case is a random tree to which things are done that modules should not have done to them. What
must come out is what `named_parameters` says; where torch itself raises, an exception, or (where
the native walk can still read the tree) what its dictionaries say.
"""

from __future__ import annotations

import copy
import gc
import pickle
import random
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import paramstats
from paramstats import engine as engines

THRESHOLDS = gc.get_threshold()
ENGINES = tuple(engines.choose(name) for name in ("native", "reference"))
KEYS = ("w", "b", "", "a.b", "ü", "\n", "\0", "\ud800", "x" * 200, "self", "0", "weight")


class HostileError(Exception):
    """What hostile code raises."""


# ---- strings, dicts and classes that are not what they seem ----------------------------------


class Text(str):
    """A key with attributes."""


class Rewriting(str):
    """Makes something else of itself behind a prefix."""

    def __radd__(self, other: str) -> str:
        return f"{other}rewritten"


class LyingDict(dict):
    def items(self) -> Any:
        return {"lie": nn.Parameter(torch.ones(2))}.items()

    def __iter__(self) -> Iterator[Any]:
        return iter(["lie"])


class RaisingDict(dict):
    def items(self) -> Any:
        raise HostileError

    def __len__(self) -> int:
        raise HostileError

    def values(self) -> Any:
        raise HostileError


class Meta(type):
    """Answers every question about its classes with a lie or an error, some of the time."""

    questions = 0

    def __getattribute__(cls, name: str) -> Any:
        Meta.questions += 1
        if Meta.questions % 7 == 0:
            raise AttributeError(name)
        return super().__getattribute__(name)

    def __subclasscheck__(cls, other: type) -> bool:
        return True

    def __instancecheck__(cls, other: Any) -> bool:
        return False


class OfMeta(nn.Module, metaclass=Meta):
    pass


class Owned(nn.Module):
    """`_parameters` is a property of the class."""

    def __init__(self) -> None:
        self.__dict__["real"] = {}
        super().__init__()
        self.__dict__["_parameters"] = {"hidden": nn.Parameter(torch.zeros(1))}

    @property
    def _parameters(self) -> Any:
        return {"shown": self.__dict__["real"].setdefault("p", nn.Parameter(torch.ones(2)))}

    @_parameters.setter
    def _parameters(self, value: Any) -> None:
        pass


class Raising(nn.Module):
    @property
    def weight(self) -> Any:
        raise HostileError

    @property
    def _buffers(self) -> Any:
        raise HostileError

    @_buffers.setter
    def _buffers(self, value: Any) -> None:
        pass


class Lying(nn.Module):
    def __getattr__(self, name: str) -> Any:
        return {"_parameters": {}, "_modules": {}}.get(name, lambda *a, **k: iter(()))


class Intercepting(nn.Module):
    def __getattribute__(self, name: str) -> Any:
        if name == "_parameters":
            return {}
        return super().__getattribute__(name)


class Unhashable(nn.Module):
    __hash__ = None  # type: ignore[assignment]


class RaisesHash(nn.Module):
    def __hash__(self) -> int:
        raise HostileError


class AllEqual(nn.Module):
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


class Slotted(nn.Module):
    __slots__ = ("_extra", "weight")


class Pretender:
    """No module, and says it is one."""

    def __init__(self) -> None:
        self._parameters = {"w": torch.ones(1)}
        self._buffers: dict[str, Any] = {}
        self._modules: dict[str, Any] = {}

    @property
    def __class__(self) -> Any:
        return nn.Module


class Recursing(nn.Module):
    """Asks for a summary of itself while it is listed."""

    depth = 0

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        if Recursing.depth < 3:
            Recursing.depth += 1
            try:
                paramstats.summarize(self)
            finally:
                Recursing.depth -= 1
        return super().named_parameters(*args, **kwargs)


class Listing(nn.Module):
    """Lists what it likes."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return iter(self.__dict__.get("listed", ()))


class Colliding:
    """An attribute's name that is as hard to tell from `_modules` as can be."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __hash__(self) -> int:
        return hash("_modules")

    def __eq__(self, other: object) -> bool:
        self.case.strike()
        return False


class Finalized:
    """Garbage, once nothing else holds it."""

    def __init__(self, case: Case) -> None:
        self.itself, self.case = self, case

    def __del__(self) -> None:
        self.case.strike()


CLASSES = (OfMeta, Owned, Raising, Lying, Intercepting, Unhashable, RaisesHash, AllEqual, Slotted)

# ---- what is done to a tree ------------------------------------------------------------------


class Case:
    """A tree and the number that it comes from."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.root = nn.Module()
        self.modules: list[nn.Module] = [self.root]
        self.is_armed = self.is_mined = False
        self.threshold = 0
        self.doomed: list[Finalized] = []
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
        """From here on `strike` strikes, once. False: nothing will have it strike."""
        self.is_armed = self.is_mined or bool(self.doomed)
        if self.doomed:
            gc.disable()
            self.doomed.clear()
            gc.set_threshold(self.threshold, 10, 10)
            gc.enable()
        return self.is_armed

    def disarm(self) -> None:
        gc.set_threshold(*THRESHOLDS)
        self.is_armed = False

    def strike(self) -> None:
        """Empties everything and reuses the memory."""
        if not self.is_armed:
            return
        self.is_armed = False
        self.empty()
        self.junk = [torch.ones(3) for _ in range(30)]

    def empty(self) -> None:
        for module in self.modules:
            for name in ("_parameters", "_buffers", "_modules"):
                held = module.__dict__.get(name)
                if type(held) is dict:
                    held.clear()


def dictionary(module: nn.Module, name: str) -> Any:
    held = module.__dict__.get(name)
    return held if type(held) is dict else {}


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
    held = dictionary(module, name)
    module.__dict__[name] = case.rng.choice(
        (OrderedDict(held), LyingDict(held), RaisingDict(held), types.MappingProxyType(held), None,
         list(held), 3, {}, dict(held))
    )  # fmt: skip


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
    dictionary(case.module(), "_modules")["shared"] = case.module()  # perhaps a cycle
    own = dictionary(case.module(), "_parameters")
    dictionary(case.module(), "_parameters").update({f"{k}_": v for k, v in own.items()})


def colliding(case: Case) -> None:
    """Before the other attributes, so that they are compared with it."""
    module = case.module()
    case.is_mined = True
    own = dict(module.__dict__)
    module.__dict__.clear()
    module.__dict__[Colliding(case)] = 1  # type: ignore[index]
    module.__dict__.update(own)


def finalized(case: Case) -> None:
    """A module that was never asked for its __dict__, and a collection that it sets off."""
    for _ in range(10):
        fresh = type("Fresh", (nn.Module,), {}) if case.rng.random() < 0.02 else nn.Module
        dictionary(case.root, "_modules")[f"f{case.rng.randrange(99)}"] = fresh()
    case.threshold = case.rng.randrange(1, 30)
    case.doomed.append(Finalized(case))


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
    held = dictionary(case.module(), "_parameters")
    if held:
        key = next(iter(held))
        held[key] = held.pop(key)
    if case.rng.random() < 0.3:
        held.clear()


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
    """2^n paths to one module."""
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

# ---- what must come out ----------------------------------------------------------------------


def grouped(named: Any) -> list[list[Any]]:
    """[tensor, name, name, ...] of each tensor, in order of the first name."""
    rows: dict[int, list[Any]] = {}
    for name, tensor in named:
        rows.setdefault(id(tensor), [tensor]).append(name)
    return list(rows.values())


def by_torch(case: Case, buffers: bool) -> list[list[Any]]:
    """What torch lists, with every name where it can tell them."""

    def listed(method: Callable[..., Any]) -> list[Any]:
        if not case.many_paths:
            try:
                return list(method(remove_duplicate=False))
            except (TypeError, RecursionError):
                pass
        return list(method())

    named = listed(case.root.named_parameters)
    return grouped(named + listed(case.root.named_buffers) if buffers else named)


def by_dictionaries(module: Any, kind: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What `_parameters` and `_modules` say, without asking any module."""
    left = [(prefix, module)]
    while left:
        prefix, module = left.pop()
        dot = "." if prefix else ""
        for key, tensor in module.__dict__[kind].items():
            if tensor is not None:
                yield f"{prefix}{dot}{key}", tensor
        children = list(module.__dict__["_modules"].items())
        left += [(f"{prefix}{dot}{key}", m) for key, m in reversed(children) if m is not None]


def expected(case: Case, buffers: bool) -> list[list[Any]] | BaseException:
    try:
        rows = by_torch(case, buffers)
    except Exception as error:
        return error
    names: dict[Any, int] = {}
    for i, (tensor, *several) in enumerate(rows):
        if not isinstance(tensor, torch.Tensor):
            return TypeError("no tensor")
        for name in several:
            if not isinstance(name, str):
                return TypeError("no name")
            if names.setdefault(name, i) != i:
                return ValueError("twice")
    return rows


def check(summary: paramstats.Summary, rows: list[list[Any]], aliases: bool) -> None:
    assert list(summary) == [row[1] for row in rows], (list(summary), rows)
    for tensor, name, *others in rows:
        entry = summary[name]
        if aliases:
            assert entry.aliases == tuple(others), (entry.aliases, others)
        if nn.parameter.is_lazy(tensor):
            assert entry.shape is None and entry.mean != entry.mean
            continue
        values = tensor.detach().to(torch.float64).reshape(-1).tolist()
        assert entry.count == len(values) and entry.shape == tuple(tensor.shape)
        if values:
            mean = sum(values) / len(values)
            assert abs(entry.mean - mean) <= 1e-5 * max(map(abs, values)), (entry, values)
        assert (entry.grad is not None) == (tensor.grad is not None)


# ---- one case --------------------------------------------------------------------------------


def run(seed: int) -> int:
    """One case; returns its executions."""
    case = Case(seed)
    rng = case.rng
    engines._engine = ENGINES[rng.random() < 0.2]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            executions = sum(_call(case) for _ in range(rng.choice((1, 2, 2, 3))))
            if rng.random() < 0.1:
                executions += _layouts(case)
            return executions
    finally:
        case.empty()  # cycles go at once
        engines._engine = ENGINES[0]


def _call(case: Case) -> int:
    rng = case.rng
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        try:
            rng.choice(RARE if rng.random() < 0.03 else COMMON)(case)
        except Exception:  # another of them has made the tree such that this one cannot be done
            continue
    buffers = rng.random() < 0.3
    right = expected(case, buffers)
    were_armed = case.arm()
    summary = raised = None
    try:
        summary = paramstats.summarize(case.root, buffers=buffers)
    except Exception as error:
        raised = error
    case.disarm()
    if were_armed:  # the tree may have been another while it was read
        return 1
    if summary is None:
        assert isinstance(right, Exception), (raised, right)
        if isinstance(right, (TypeError, ValueError)):
            assert isinstance(raised, (TypeError, ValueError, HostileError)), (raised, right)
        return 1
    if isinstance(right, Exception):  # torch cannot list it: it is too deep, or without a hash
        named = list(by_dictionaries(case.root, "_parameters"))
        if buffers:
            named += by_dictionaries(case.root, "_buffers")
        right = grouped(named)
    check(summary, right, aliases=not case.many_paths)
    return 1


def _layouts(case: Case) -> int:
    """The native walk itself, whose callback may do anything."""
    native = ENGINES[0].native

    def raising(*_: Any) -> Any:
        raise HostileError

    def striking(*_: Any) -> Any:
        case.empty()
        gc.collect()
        return 1

    def recursing(*_: Any) -> Any:
        native.walk(case.root, True, lambda *_: 3)
        return paramstats.summarize(nn.Linear(1, 1))

    def dropping(*_: Any) -> Any:
        case.modules, case.root = [], nn.Module()
        return 2

    make = case.rng.choice((raising, striking, recursing, dropping, None, 3, str))
    try:
        found = native.walk(case.root, case.rng.random() < 0.5, make)
    except (HostileError, TypeError):
        return 1
    assert found is None or all(isinstance(t, torch.Tensor) for t in found[1])
    return 1
