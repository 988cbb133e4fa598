"""Write layouts and entries as lines of JSON; parse and check such lines.

docs/history.md lists every key. Parsing checks all values, because the code that uses a `Summary`
later does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import starmap
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from paramstats._core.denormals import with_denormals
from paramstats._core.format import dtype_name
from paramstats._core.layout import Layout
from paramstats._core.moments import ABSENT, INF, NAN, ROW, Moments, finite_count, unread
from paramstats._core.record import Record
from paramstats._core.torch_private import without_modes
from paramstats._summary import Summary, record_of

HEADER = b'{"paramstats": "history", "version": 1}\n'

_NO_REASONS: Mapping[str, str] = MappingProxyType({})
_COUNTS = Moments._fields[1:5]
_FLOATS = Moments._fields[5:]


class Entry(NamedTuple):
    """A summary at a step of a run."""

    step: int
    number: int
    """Position of the entry in the run, counting from 0; entries dropped from memory count too.
    After the run went back, an entry gets the number of the one that it replaces."""
    summary: Summary
    serial: int = 0
    """Position in the order of appending; never decreases. It is not in the file."""


def layout_line(layout: Layout) -> bytes:
    """Return the line for a layout, with its newline."""
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
    if layout.wrapper_names:
        content["wrapper_names"] = layout.wrapper_names
    if layout.is_sharded:
        content["is_sharded"] = True
    return json.dumps(content).encode() + b"\n"


@without_modes()
def parse_layout(content: dict[str, Any]) -> Layout:
    """Return the layout of a parsed line; raises an error if a value is not valid."""
    names = tuple(_list_of(str, content["names"], "names"))
    aliases = content["aliases"]
    expect(type(aliases) is dict and aliases.keys() <= set(names), "aliases by name", aliases)
    all_names = [*names]
    for names_of_one in aliases.values():
        all_names += _list_of(str, names_of_one, "aliases")
    expect(len(set(all_names)) == len(all_names), "distinct names", all_names)
    parameters = content["parameters"]
    expect(type(parameters) is int and 0 <= parameters <= len(names), "parameters", parameters)
    n = len(names)
    wrapper_names = _list_of(list, content.get("wrapper_names", []), "wrapper_names")
    expect(len(wrapper_names) in (0, n), "wrapper names of all tensors or none", wrapper_names)
    return Layout.shared(
        names,
        tuple(tuple(aliases.get(name, ())) for name in names),
        parameters,
        tuple(map(_shape, _list_of(object, content["shapes"], "shapes", n))),
        tuple(map(_dtype, _list_of(str, content["dtypes"], "dtypes", n))),
        tuple(map(torch.device, _list_of(str, content["devices"], "devices", n))),
        tuple(_list_of(bool, content["requires_grad"], "requires_grad", n)),
        tuple(tuple(_list_of(str, full_names, "wrapper names")) for full_names in wrapper_names),
        _flag(content, "is_sharded"),
    )


def _shape(shape: Any) -> tuple[int, ...] | None:
    if shape is None:
        return None
    sizes = tuple(_list_of(int, shape, "a shape"))
    expect(min(sizes, default=0) >= 0, "a shape", shape)
    return sizes


def _dtype(name: str) -> torch.dtype:
    dtype = vars(torch).get(name)  # getattr would import some submodules
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"expected a dtype of this torch version, got {name!r}")
    return dtype


@with_denormals
def entry_line(entry: Entry) -> bytes:
    """Return the line for an entry, with its newline; waits for its statistics."""
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
    states = json.dumps(columns, separators=(",", ":"))
    # No string in it contains these words: all keys are names of columns.
    states = states.replace("NaN", "null").replace("Infinity", "1e999")
    return f"{json.dumps(head)[:-1]}, {states[1:]}\n".encode()


def _columns(rows: list[tuple[Any, ...]], counts: list[int]) -> dict[str, tuple[Any, ...]]:
    """Return states by column, without columns that equal their default: `counts` or zeros."""
    columns = dict(zip(Moments._fields, zip(*rows, strict=True), strict=False))
    defaults = {"count": counts, **{name: [0] * len(rows) for name in _COUNTS}}
    return {name: column for name, column in columns.items() if list(column) != defaults.get(name)}


def parse_entry(content: dict[str, Any], layout: Layout) -> Entry:
    """Return the entry of a parsed line; raises an error if a value is not valid."""
    is_real = [not dtype.is_complex for dtype in layout.dtypes]
    params = _states(content["params"], _numels(layout), 0, is_real)
    if "grads" in content:
        grads = _states(content["grads"], [state.count for state in params], ABSENT, is_real)
    else:
        grads = [unread(ABSENT)] * len(params)
    grad_scale = _number(content["grad_scale"], "grad_scale")
    expect(grad_scale > 0 and math.isfinite(1 / grad_scale), "grad_scale > 0", grad_scale)
    record = Record(
        layout,
        b"".join(starmap(ROW.pack, params + grads)),
        _number(content["correction"], "correction"),
        grad_scale,
        _reasons(content, "skipped"),
        _reasons(content, "diverged"),
        _flag(content, "is_local"),
    )
    step, number = content["step"], content["number"]
    expect(type(step) is int and -(1 << 63) <= step < 1 << 63, "a step", step)
    expect(type(number) is int and 0 <= number < 1 << 63, "a number", number)
    return Entry(step, number, Summary(record))


def _states(
    columns: dict[str, list[Any]], counts: list[int], min_count: int, is_real: list[bool]
) -> list[Moments]:
    """Return the states of the rows; raises ValueError if no tensor can have such a state."""
    zeros = [0] * len(counts)
    integers = [columns.get("count", counts), *(columns.get(name, zeros) for name in _COUNTS)]
    floats = [[NAN if x is None else x for x in columns.get(name, [])] for name in _FLOATS]
    rows = list(zip(*integers, *floats, strict=True))
    expect(len(rows) == len(counts), f"{len(counts)} values in each column", len(rows))
    packed = b"".join(starmap(ROW.pack, rows))  # raises an error for values of other types
    states = list(map(Moments._make, ROW.iter_unpack(packed)))
    for state, is_real_ in zip(states, is_real, strict=True):
        expect(state.count >= min_count, f"a count >= {min_count}", state)
        expect(_is_possible(state, is_real_), "a tensor's state", state)
    total = sum(state.count for state in states)
    expect(total < 1 << 63, "counts with a sum below 2^63", total)
    return states


def _is_possible(a: Moments, is_real: bool) -> bool:
    """Return whether some tensor has this state, up to rounding errors.

    The mean and m2 of complex elements near the limit of float64 may be infinite or NaN.
    """
    parts = a[1:5]
    if min(parts) < 0 or sum(parts) > max(a.count, 0) or a.m2 < 0:
        return False
    if math.isnan(a.mean):
        return not is_real or (sum(parts) == 0 and all(map(math.isnan, a[6:])))
    n = finite_count(a)
    if n <= 0:
        return a.count >= 0 and a[5:] == (0, 0, INF, -INF)
    if not is_real:
        return not a.min > a.max
    # n elements between min and max have m2 <= n ((max - min) / 2)^2 (Popoviciu 1935).
    rounding = 1e-6 * max(abs(a.min), abs(a.max))
    radius = (a.max - a.min) / 2 + rounding
    return (
        -INF < a.min <= a.max < INF
        and a.min - rounding <= a.mean <= a.max + rounding
        and a.m2 <= n * radius * radius * 1.001 + 1e-290
        and (a.zeros == 0 or a.min <= 0 <= a.max)
    )


def expect(condition: bool, what: str, got: object) -> None:
    """Raise ValueError unless `condition` holds; `assert` would not run under `python -O`."""
    if not condition:
        raise ValueError(f"expected {what}, got {repr(got)[:80]}")


def _list_of(kind: type, values: Any, what: str, length: int | None = None) -> list[Any]:
    expect(type(values) is list and length in (None, len(values)), f"a list for {what}", values)
    expect(kind is object or set(map(type, values)) <= {kind}, f"{kind.__name__}s, {what}", values)
    return list(values)


def _number(value: Any, what: str) -> float:
    expect(type(value) in (int, float) and math.isfinite(value), f"a number for {what}", value)
    return float(value)


def _flag(content: dict[str, Any], key: str) -> bool:
    value = content.get(key, False)
    expect(type(value) is bool, f"true or false for {key}", value)
    return bool(value)


def _reasons(content: dict[str, Any], key: str) -> Mapping[str, str]:
    reasons = content.get(key, _NO_REASONS)
    expect(reasons is _NO_REASONS or type(reasons) is dict, f"{key} by name", reasons)
    _list_of(str, list(reasons.values()), key)
    return dict(reasons) if reasons else _NO_REASONS


def _numels(layout: Layout) -> list[int]:
    return [0 if shape is None else math.prod(shape) for shape in layout.shapes]
