"""The lines of a history's file: a layout or an entry as JSON, and back.

docs/history.md has every key. Whatever a line holds is checked here: statistics are made of it later
without a look.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import starmap
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from paramstats._core.format import dtype_name
from paramstats._core.layout import Layout
from paramstats._core.moments import ABSENT, NAN, ROW, Moments, unread
from paramstats._core.record import Record
from paramstats._summary import Summary, record_of

_NONE: Mapping[str, str] = MappingProxyType({})

_COUNTS = Moments._fields[1:5]
_FIGURES = Moments._fields[5:]


class Entry(NamedTuple):
    """`number`: how many entries of the run are before it, also where not all of them are left;
    after going back, that of the entry whose place it takes."""

    step: int
    number: int
    summary: Summary


def layout_line(layout: Layout) -> bytes:
    content = {
        "names": layout.names,
        "aliases": {
            name: aliases
            for name, aliases in zip(layout.names, layout.aliases, strict=True)
            if aliases
        },
        "parameters": layout.parameters,
        "shapes": layout.shapes,
        "dtypes": list(map(dtype_name, layout.dtypes)),
        "devices": [str(device) for device in layout.devices],
        "requires_grad": layout.requires_grad,
    }
    return json.dumps(content).encode() + b"\n"


def layout_of(content: dict[str, Any]) -> Layout:
    names = tuple(_list_of(str, content["names"], "names"))
    expect(len(set(names)) == len(names), "distinct names", names)
    aliases = content["aliases"]
    expect(type(aliases) is dict, "aliases by name", aliases)
    for several in aliases.values():
        _list_of(str, several, "aliases")
    parameters = content["parameters"]
    expect(type(parameters) is int and 0 <= parameters <= len(names), "parameters", parameters)
    n = len(names)
    return Layout.shared(
        names,
        tuple(tuple(aliases.get(name, ())) for name in names),
        parameters,
        tuple(map(_shape, _list_of(object, content["shapes"], "shapes", n))),
        tuple(map(_dtype, _list_of(str, content["dtypes"], "dtypes", n))),
        tuple(map(torch.device, _list_of(str, content["devices"], "devices", n))),
        tuple(_list_of(bool, content["requires_grad"], "requires_grad", n)),
    )


def _shape(shape: Any) -> tuple[int, ...] | None:
    if shape is None:
        return None
    sizes = tuple(_list_of(int, shape, "a shape"))
    expect(min(sizes, default=0) >= 0, "a shape", shape)
    return sizes


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"expected a dtype of this torch, got {name!r}")
    return dtype


def entry_line(entry: Entry) -> bytes:
    record = record_of(entry.summary)
    head: dict[str, Any] = {
        "step": entry.step,
        "number": entry.number,
        "correction": record.correction,
        "grad_scale": record.grad_scale,
    }
    if record.skipped:
        head["skipped"] = dict(record.skipped)
    if record.diverged:
        head["diverged"] = dict(record.diverged)
    if record.is_local:
        head["is_local"] = True
    rows = list(ROW.iter_unpack(record.table))
    n = len(record.layout)
    columns = {"params": _columns(rows[:n], _numels(record.layout))}
    if any(row[0] != ABSENT for row in rows[n:]):
        columns["grads"] = _columns(rows[n:], [row[0] for row in rows[:n]])
    statistics = json.dumps(
        columns, separators=(",", ":")
    )  # no strings but keys: safe to replace in
    statistics = statistics.replace("NaN", "null").replace("Infinity", "1e999")
    return f"{json.dumps(head)[:-1]}, {statistics[1:]}\n".encode()


def _columns(rows: list[tuple[Any, ...]], counts: list[int]) -> dict[str, tuple[Any, ...]]:
    """Without the counts that say nothing: `counts` as expected, all others zero."""
    columns = dict(zip(Moments._fields, zip(*rows, strict=True), strict=False))
    usual = {"count": counts, **{name: [0] * len(rows) for name in _COUNTS}}
    return {name: column for name, column in columns.items() if list(column) != usual.get(name)}


def entry_of(content: dict[str, Any], layout: Layout) -> Entry:
    params = _states(content["params"], _numels(layout))
    if "grads" in content:
        grads = _states(content["grads"], [state.count for state in params])
    else:
        grads = [unread(ABSENT)] * len(params)
    grad_scale = _number(content["grad_scale"], "grad_scale")
    expect(grad_scale > 0 and math.isfinite(1 / grad_scale), "grad_scale > 0", grad_scale)
    is_local = content.get("is_local", False)
    expect(type(is_local) is bool, "true or false for is_local", is_local)
    record = Record(
        layout,
        b"".join(starmap(ROW.pack, params + grads)),
        _number(content["correction"], "correction"),
        grad_scale,
        _reasons(content, "skipped"),
        _reasons(content, "diverged"),
        is_local,
    )
    step, number = content["step"], content["number"]
    expect(type(step) is int and -(1 << 63) <= step < 1 << 63, "a step", step)
    expect(type(number) is int and 0 <= number < 1 << 63, "a number", number)
    return Entry(step, number, Summary(record))


def _states(columns: Any, counts: list[int]) -> list[Moments]:
    """Of counts that a tensor can have: what is read from them has no checks of its own."""
    expect(type(columns) is dict, "columns", columns)
    n = len(counts)
    found: list[list[Any]] = [_list_of(int, columns.get("count", counts), "count", n)]
    found += [_list_of(int, columns.get(name, [0] * n), name, n) for name in _COUNTS]
    for name in _FIGURES:
        statistics = [
            NAN if x is None else x for x in _list_of(object, columns.get(name, []), name)
        ]
        expect(
            len(statistics) == n and set(map(type, statistics)) <= {int, float}, name, statistics
        )
        found.append(statistics)
    states = list(starmap(Moments, zip(*found, strict=True)))
    for state in states:
        others = state[1:5]
        is_possible = state.count >= ABSENT and min(others) >= 0 and not state.m2 < 0
        expect(is_possible and sum(others) <= max(state.count, 0), "a tensor's statistics", state)
    expect(sum(state.count for state in states) < 1 << 63, "counts of 64 bits in all", n)
    return states


def expect(condition: bool, what: str, got: object) -> None:
    # no assert: python -O reads files, too
    if not condition:
        raise ValueError(f"expected {what}, got {repr(got)[:80]}")


def _list_of(kind: type, values: Any, what: str, length: int | None = None) -> list[Any]:
    expect(type(values) is list and length in (None, len(values)), f"a list for {what}", values)
    expect(kind is object or set(map(type, values)) <= {kind}, f"{kind.__name__}s, {what}", values)
    return list(values)


def _number(value: Any, what: str) -> float:
    expect(type(value) in (int, float) and math.isfinite(value), f"a number for {what}", value)
    return float(value)


def _reasons(content: dict[str, Any], key: str) -> Mapping[str, str]:
    reasons = content.get(key, _NONE)
    expect(reasons is _NONE or type(reasons) is dict, f"{key} by name", reasons)
    _list_of(str, list(reasons.values()), key)
    return dict(reasons) if reasons else _NONE


def _numels(layout: Layout) -> list[int]:
    return [0 if shape is None else math.prod(shape) for shape in layout.shapes]
