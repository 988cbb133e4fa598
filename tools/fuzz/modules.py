"""`summarize` and the native walk of damaged modules: the names that torch lists, or an exception.

A case is a random tree of modules that is damaged in several ways. `summarize` must list what
`named_parameters` lists. Where torch raises, `summarize` raises too, or lists what the modules'
dictionaries hold if the native walk can still read them.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import paramstats
from paramstats._core import backend as backends
from tools.fuzz.damage import COMMON, RARE, Case
from tools.fuzz.hostile import HostileError

BACKENDS = tuple(backends.choose(name) for name in ("native", "reference"))


def grouped(named: Any) -> list[list[Any]]:
    """[tensor, name, name, ...] of each tensor, in order of the first name."""
    rows: dict[int, list[Any]] = {}
    for name, tensor in named:
        rows.setdefault(id(tensor), [tensor]).append(name)
    return list(rows.values())


def by_torch(case: Case, buffers: bool) -> list[list[Any]]:
    """What torch lists, with all names of shared tensors where possible."""

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
    """The tensors in the modules' dictionaries, without calling a method of any module."""
    remaining = [(prefix, module)]
    while remaining:
        prefix, module = remaining.pop()
        dot = "." if prefix else ""
        for key, tensor in module.__dict__[kind].items():
            if tensor is not None:
                yield f"{prefix}{dot}{key}", tensor
        children = list(module.__dict__["_modules"].items())
        remaining += [(f"{prefix}{dot}{key}", m) for key, m in reversed(children) if m is not None]


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


def run(seed: int) -> int:
    """Runs one case; returns its executions."""
    case = Case(seed)
    rng = case.rng
    backends._active = BACKENDS[rng.random() < 0.2]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            executions = sum(_call(case) for _ in range(rng.choice((1, 2, 2, 3))))
            if rng.random() < 0.1:
                executions += _layouts(case)
            return executions
    finally:
        case.empty()  # breaks cycles of modules
        backends._active = BACKENDS[0]


def _call(case: Case) -> int:
    rng = case.rng
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        try:
            rng.choice(RARE if rng.random() < 0.03 else COMMON)(case)
        except Exception:  # earlier damage made this one impossible
            continue
    buffers = rng.random() < 0.3
    expected_rows = expected(case, buffers)
    was_armed = case.arm()
    summary = raised = None
    try:
        summary = paramstats.summarize(case.root, buffers=buffers)
    except Exception as error:
        raised = error
    case.disarm()
    if was_armed:  # the tree may have changed while it was read
        return 1
    if summary is None:
        assert isinstance(expected_rows, Exception), (raised, expected_rows)
        if isinstance(expected_rows, (TypeError, ValueError)):
            assert isinstance(raised, (TypeError, ValueError, HostileError)), (
                raised,
                expected_rows,
            )
        return 1
    if isinstance(
        expected_rows, Exception
    ):  # torch cannot list a tree that is too deep or unhashable
        named = list(by_dictionaries(case.root, "_parameters"))
        if buffers:
            named += by_dictionaries(case.root, "_buffers")
        expected_rows = grouped(named)
    check(summary, expected_rows, aliases=not case.many_paths)
    return 1


def _layouts(case: Case) -> int:
    """Calls the native walk with a callback that raises, recurses or empties the tree."""
    native = BACKENDS[0].native

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
