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
from paramstats._core.details import NO_DETAILS, Details
from paramstats._core.format import dtype_name
from paramstats._core.layout import Layout
from paramstats._core.moments import ABSENT, ROW, unread
from paramstats._core.record import Record
from paramstats._core.torch_private import without_modes
from paramstats._history.details_json import details_text, parse_details
from paramstats._history.optimizer_json import optimizer_text, parse_optimizer
from paramstats._history.state_columns import (
    expect,
    from_columns,
    is_complex_state,
    is_real_state,
    list_of,
    to_columns,
    to_number,
)
from paramstats._summary import Summary, record_of

HEADER = b'{"paramstats": "history", "version": 1}\n'

_NO_REASONS: Mapping[str, str] = MappingProxyType({})


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
    names = tuple(list_of(str, content["names"], "names"))
    aliases = content["aliases"]
    expect(type(aliases) is dict and aliases.keys() <= set(names), "aliases by name", aliases)
    all_names = [*names]
    for names_of_one in aliases.values():
        all_names += list_of(str, names_of_one, "aliases")
    expect(len(set(all_names)) == len(all_names), "distinct names", all_names)
    parameters = content["parameters"]
    expect(type(parameters) is int and 0 <= parameters <= len(names), "parameters", parameters)
    n = len(names)
    wrapper_names = list_of(list, content.get("wrapper_names", []), "wrapper_names")
    expect(len(wrapper_names) in (0, n), "wrapper names of all tensors or none", wrapper_names)
    return Layout.shared(
        names,
        tuple(tuple(aliases.get(name, ())) for name in names),
        parameters,
        tuple(map(_shape, list_of(object, content["shapes"], "shapes", n))),
        tuple(map(_dtype, list_of(str, content["dtypes"], "dtypes", n))),
        tuple(map(torch.device, list_of(str, content["devices"], "devices", n))),
        tuple(list_of(bool, content["requires_grad"], "requires_grad", n)),
        tuple(tuple(list_of(str, full_names, "wrapper names")) for full_names in wrapper_names),
        _flag(content, "is_sharded"),
    )


def _shape(shape: Any) -> tuple[int, ...] | None:
    if shape is None:
        return None
    sizes = tuple(list_of(int, shape, "a shape"))
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
    columns = {"params": to_columns(rows[:n], _numels(record.layout))}
    if any(row[0] != ABSENT for row in rows[n:]):
        columns["grads"] = to_columns(rows[n:], [row[0] for row in rows[:n]])
    states = json.dumps(columns, separators=(",", ":"))
    # No string in it contains these words: all keys are names of columns.
    states = states.replace("NaN", "null").replace("Infinity", "1e999")
    if record.optimizer is not None:
        text = optimizer_text(record.optimizer, [row[0] for row in rows[:n]])
        states = f'{states[:-1]},"optimizer":{text}}}'
    if text := details_text(record):
        states = f'{states[:-1]},"details":{text}}}'
    return f"{json.dumps(head)[:-1]}, {states[1:]}\n".encode()


def parse_entry(content: dict[str, Any], layout: Layout) -> Entry:
    """Return the entry of a parsed line; raises an error if a value is not valid."""
    checks = [is_complex_state if dtype.is_complex else is_real_state for dtype in layout.dtypes]
    params = from_columns(content["params"], _numels(layout), 0, checks)
    counts = [state.count for state in params]
    grads = [unread(ABSENT)] * len(params)
    if "grads" in content:
        grads = from_columns(content["grads"], counts, ABSENT, checks)
    optimizer = None
    if "optimizer" in content:
        optimizer = parse_optimizer(content["optimizer"], counts)
    details: Details = NO_DETAILS
    if "details" in content:
        details = parse_details(content["details"], layout.names, params + grads)
    grad_scale = to_number(content["grad_scale"], "grad_scale")
    expect(grad_scale > 0 and math.isfinite(1 / grad_scale), "grad_scale > 0", grad_scale)
    record = Record(
        layout,
        b"".join(starmap(ROW.pack, params + grads)),
        to_number(content["correction"], "correction"),
        grad_scale,
        _reasons(content, "skipped"),
        _reasons(content, "diverged"),
        _flag(content, "is_local"),
        optimizer,
        details,
    )
    step, number = content["step"], content["number"]
    expect(type(step) is int and -(1 << 63) <= step < 1 << 63, "a step", step)
    expect(type(number) is int and 0 <= number < 1 << 63, "a number", number)
    return Entry(step, number, Summary(record))


def _flag(content: dict[str, Any], key: str) -> bool:
    value = content.get(key, False)
    expect(type(value) is bool, f"true or false for {key}", value)
    return bool(value)


def _reasons(content: dict[str, Any], key: str) -> Mapping[str, str]:
    reasons = content.get(key, _NO_REASONS)
    expect(reasons is _NO_REASONS or type(reasons) is dict, f"{key} by name", reasons)
    list_of(str, list(reasons.values()), key)
    return dict(reasons) if reasons else _NO_REASONS


def _numels(layout: Layout) -> list[int]:
    return [0 if shape is None else math.prod(shape) for shape in layout.shapes]
