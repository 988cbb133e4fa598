"""Of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benches.tables.cells import NONE, duration, measured_on, ratio, table, time


def render(report: dict[str, Any]) -> str:
    cases = report["cases"].values()
    models = [case for case in cases if case["tensors"] > 1]
    memories = [case for case in cases if case["tensors"] == 1]
    parts = []
    if models:
        columns = [[head, *map(cell, models)] for head, cell in _MODEL_COLUMNS]
        shown = [column for column in columns if set(column[1:]) != {NONE}]
        head, *rows = zip(*shown, strict=True)
        parts.append(table(head, rows))
    if memories:
        parts.append(_memory_table(memories))
    steps = list(report.get("step_cost", {}).get("steps", {}).values())
    if steps:
        parts.append(_step_table(steps))
    return "\n\n".join([*parts, _legend(report)])


_MOSTLY_CALL = 1 << 18
"""Bytes that are read in less time than it takes to call for it."""

_MANY = 1000
"""Tensors from which on it says what one takes."""

Cell = Callable[[dict[str, Any]], str]


def _times_as_long(contestant: str, base: str = "paramstats_scalars") -> Cell:
    """To the last float, as those others give them."""
    return lambda case: ratio(case, contestant, base)


def _paramstats(case: dict[str, Any]) -> str:
    seconds = case["median_s"].get("paramstats")
    if seconds is None or case["tensors"] < _MANY:
        return time(seconds)
    return f"{time(seconds)} ({seconds / case['tensors'] * 1e9:.0f} ns a tensor)"


_MODEL_COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("parameters and gradients of", lambda case: str(case["title"])),
    ("paramstats", _paramstats),
    ("with `scalars()`", lambda case: duration(case, "paramstats_scalars")),
    ("`.item()` loop", _times_as_long("item_loop_no_grad")),
    ("batched torch", _times_as_long("batched_torch")),
    ("compiled torch", _times_as_long("compiled_torch")),
    ("NumPy", _times_as_long("numpy")),
    ("lovely-tensors", _times_as_long("lovely_tensors")),
    ("`_foreach_norm`", _times_as_long("foreach_norm_only")),
    ("of the read-only limit", lambda case: _share(case)),
    (
        "reference backend against the loop",
        _times_as_long("item_loop_no_grad", "paramstats_reference"),
    ),
)


def _memory_table(cases: list[dict[str, Any]]) -> str:
    """A row for each type, a column for each size and number of threads."""
    columns = sorted({(case["bytes"], case["threads"]) for case in cases})
    cells = {}
    sizes = {}
    for case in cases:
        size, dtype = size_and_dtype(case)
        sizes[case["bytes"]] = size
        cells[dtype, (case["bytes"], case["threads"])] = _share_and_rate(case)
    head = []
    for size, threads in columns:
        alone = sum(other == size for other, _ in columns) == 1
        head.append(sizes[size] if alone else f"{sizes[size]}, {_threads(threads)}")
        if size < _MOSTLY_CALL:
            head[-1] += " (mostly the call)"
    dtypes = in_order(dtype for dtype, _ in cells)
    rows = [(dtype, *(cells.get((dtype, at), NONE) for at in columns)) for dtype in dtypes]
    return table(("one tensor", *head), rows)


def size_and_dtype(case: dict[str, Any]) -> tuple[str, str]:
    """("1 GiB", "float32") of "1 GiB of float32"."""
    size, _, dtype = case["title"].partition(" of ")
    return size, dtype


def in_order(dtypes: Iterable[str]) -> list[str]:
    """Each once, those read with other instructions last ("float32, avx2")."""
    return sorted(dict.fromkeys(dtypes), key=lambda dtype: "," in dtype)


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


def _share_and_rate(case: dict[str, Any]) -> str:
    seconds = case["median_s"].get("paramstats")
    if seconds is None:
        return NONE
    return f"{_share(case)} ({case['bytes'] / seconds / 1e9:.0f} GB/s)"


def _step_table(steps: list[dict[str, Any]]) -> str:
    """A row for each tool, a column for each training."""
    head = [f"{step['title']} ({time(step['tools']['nothing']['step_s'])})" for step in steps]
    titles = {
        name: tool["title"]
        for step in steps
        for name, tool in step["tools"].items()
        if name != "nothing"
    }
    rows = [
        (title, *(_added(step["tools"].get(name)) for step in steps))
        for name, title in titles.items()
    ]
    return table(("added to a training step of", *head), rows)


def _added(tool: dict[str, Any] | None) -> str:
    if tool is None:
        return NONE
    seconds, more = tool["added_s"], tool["more"]
    percent = f"{more:+.0%}" if abs(more) >= 0.1 else f"{more:+.1%}"
    low, high = tool["added_quartiles_s"]
    noise = " (noise)" if low <= 0 <= high else ""
    return f"{'-' if seconds < 0 else ''}{time(abs(seconds))}, {percent}{noise}"


def _share(case: dict[str, Any]) -> str:
    """The read-only loop's time in parts of paramstats'."""
    limit, seconds = (case["median_s"].get(name) for name in ("read_only", "paramstats"))
    return NONE if limit is None or seconds is None else f"{limit / seconds:.2f}"


def _legend(report: dict[str, Any]) -> str:
    steps = (
        "What is added to a step is told from steps without a tool, in turns (noise: the middle "
        "half of the turns has zero in it); `wandb.watch` makes histograms, `grad_norm` norms of "
        "gradients alone. A dash: not measured. "
        if report.get("step_cost")
        else ""
    )
    return (
        "Nx: takes N times as long as paramstats with `scalars()`, which makes floats of four "
        "statistics of each tensor, as the others do (the loop under `no_grad`; `_foreach_norm` gives "
        "the norm alone; compiled torch: up to 64 tensors, beyond which compiling takes minutes). "
        "The limit "
        "is a loop that only reads the same bytes; 1.00 is as fast. "
        f"{steps}{measured_on(report)}"
    )
