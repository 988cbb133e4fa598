"""Renders the tables of docs/benchmarks.md from the medians that benches.report collects.

Every ratio is printed, also where another contestant is faster than paramstats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from docs import blocks

Case = dict[str, Any]
Cell = Callable[[Case], str]

NONE = "-"
"""Shown where nothing was measured."""

_MOSTLY_CALL = 1 << 18
"""Bytes below which the overhead of the call is larger than the time to read the memory."""

_MANY = 1000
"""Number of tensors from which the table shows the time per tensor."""


def render(report: dict[str, Any]) -> str:
    """Return the tables and a legend in Markdown."""
    on_gpu = report["device"] == "cuda"
    cases = report["cases"].values()
    several = [case for case in cases if case["tensors"] > 1]
    single = [case for case in cases if case["tensors"] == 1]
    parts = [_table_of(_CUDA_MODEL_COLUMNS if on_gpu else _MODEL_COLUMNS, several)]
    parts.append(_table_of(_CUDA_TENSOR_COLUMNS, single) if on_gpu else _tensor_table(single))
    calls = report.get("on_gpu", {}).get("calls")
    if isinstance(calls, list):  # else that part failed
        parts.append(_table_of(_CALL_COLUMNS, calls))
    parts.append(_step_table(list(report.get("step_cost", {}).get("steps", {}).values())))
    parts.append(f"{_CUDA_LEGEND if on_gpu else _LEGEND} {_measured_on(report)}")
    return "\n\n".join(filter(None, parts))


# ---- cells --------------------------------------------------------------------------------------


def _time(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _times(seconds: float | None, base: float | None) -> str:
    if seconds is None or base is None:
        return NONE
    ratio = seconds / base
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2g}x"


def _median(contestant: str) -> Cell:
    return lambda case: _time(case["median_s"].get(contestant))


def _relative(contestant: str, base: str = "paramstats_scalars") -> Cell:
    return lambda case: _times(case["median_s"].get(contestant), case["median_s"].get(base))


def _device_s(case: Case, contestant: str) -> float | None:
    seconds: float | None = case.get("device_s", {}).get(contestant)
    return seconds


def _relative_on_device(contestant: str) -> Cell:
    return lambda case: _times(_device_s(case, contestant), _device_s(case, "paramstats"))


def _share_of_limit(case: Case) -> str:
    limit, seconds = (case["median_s"].get(name) for name in ("read_only", "paramstats"))
    return NONE if limit is None or seconds is None else f"{limit / seconds:.2f}"


def _share_of_copy(case: Case) -> str:
    """Bytes read per second, relative to the bytes that a copy reads and writes per second."""
    copy, seconds = (_device_s(case, name) for name in ("copy", "paramstats"))
    return NONE if copy is None or seconds is None else f"{copy / 2 / seconds:.2f}"


def _rate(case: Case, seconds: float | None) -> str:
    return NONE if seconds is None else f"{case['bytes'] / seconds / 1e9:.0f}"


def _paramstats(case: Case) -> str:
    seconds = case["median_s"].get("paramstats")
    if seconds is None or case["tensors"] < _MANY:
        return _time(seconds)
    return f"{_time(seconds)} ({seconds / case['tensors'] * 1e9:.0f} ns per tensor)"


def _text(key: str) -> Cell:
    return lambda row: str(row[key])


# ---- tables with one row per case ---------------------------------------------------------------

Columns = tuple[tuple[str, Cell], ...]

_MODEL_COLUMNS: Columns = (
    ("parameters and gradients of", _text("title")),
    ("paramstats", _paramstats),
    ("with `scalars()`", _median("paramstats_scalars")),
    ("`.item()` loop", _relative("item_loop_no_grad")),
    ("batched torch", _relative("batched_torch")),
    ("compiled torch", _relative("compiled_torch")),
    ("NumPy", _relative("numpy")),
    ("lovely-tensors", _relative("lovely_tensors")),
    ("`_foreach_norm`", _relative("foreach_norm_only")),
    ("share of the read-only limit", _share_of_limit),
    (
        "`.item()` loop, relative to the reference backend",
        _relative("item_loop_no_grad", "paramstats_reference"),
    ),
)
_CUDA_MODEL_COLUMNS: Columns = (
    *_MODEL_COLUMNS[:2],
    ("GPU time", lambda case: _time(_device_s(case, "paramstats"))),
    ("share of the copy's rate", _share_of_copy),
    *_MODEL_COLUMNS[2:],
)
_CUDA_TENSOR_COLUMNS: Columns = (
    ("one tensor", _text("title")),
    ("paramstats", _paramstats),
    ("GPU time", lambda case: _time(_device_s(case, "paramstats"))),
    ("GB/s", lambda case: _rate(case, _device_s(case, "paramstats"))),
    ("share of the copy's rate", _share_of_copy),
    ("batched torch", _relative_on_device("batched_torch")),
    ("compiled torch", _relative_on_device("compiled_torch")),
    ("`_foreach_norm`", _relative_on_device("foreach_norm_only")),
    ("reference backend", _relative_on_device("paramstats_reference")),
)
_CALL_COLUMNS: Columns = (
    ("one call (native: at most 150 us of host time for 1,000 tensors)", _text("case")),
    ("backend", _text("backend")),
    ("host time", lambda row: _time(row["host_s"])),
    ("while the GPU is busy", lambda row: _time(row.get("busy_s"))),
    ("until statistics can be read", lambda row: _time(row["complete_s"])),
    *((key, _text(key)) for key in ("launches", "copies", "waits", "allocations")),
)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return blocks.table(head, rows, right=range(1, len(head)))


def _table_of(columns: Columns, rows: list[Case]) -> str:
    """Return one row per case, without the columns that are empty for all of them."""
    if not rows:
        return ""
    filled = [[head, *map(cell, rows)] for head, cell in columns]
    head, *body = zip(*(column for column in filled if set(column[1:]) != {NONE}), strict=True)
    return _table(head, body)


# ---- one tensor on a CPU: one row per dtype, one column per size and number of threads ----------


def _tensor_table(cases: list[Case]) -> str:
    if not cases:
        return ""
    columns = sorted({(case["bytes"], case["threads"]) for case in cases})
    sizes, cells = {}, {}
    for case in cases:
        sizes[case["bytes"]], dtype = size_and_dtype(case)
        cells[dtype, (case["bytes"], case["threads"])] = _share_and_rate(case)
    head = []
    for nbytes, threads in columns:
        only_one = sum(other == nbytes for other, _ in columns) == 1
        suffix = "" if only_one else f", {threads} thread{'s' if threads > 1 else ''}"
        note = " (mostly overhead of the call)" if nbytes < _MOSTLY_CALL else ""
        head.append(f"{sizes[nbytes]}{suffix}{note}")
    dtypes = in_order(dtype for dtype, _ in cells)
    rows = [(dtype, *(cells.get((dtype, at), NONE) for at in columns)) for dtype in dtypes]
    return _table(("one tensor", *head), rows)


def size_and_dtype(case: Case) -> tuple[str, str]:
    """Split a title: "1 GiB of float32" gives ("1 GiB", "float32")."""
    size, _, dtype = case["title"].partition(" of ")
    return size, dtype


def in_order(dtypes: Iterable[str]) -> list[str]:
    """Remove duplicates; put dtypes with a SIMD level ("float32, avx2") last."""
    return sorted(dict.fromkeys(dtypes), key=lambda dtype: "," in dtype)


def _share_and_rate(case: Case) -> str:
    seconds = case["median_s"].get("paramstats")
    return NONE if seconds is None else f"{_share_of_limit(case)} ({_rate(case, seconds)} GB/s)"


# ---- training steps: one row per tool, one column per training ----------------------------------


def _step_table(steps: list[dict[str, Any]]) -> str:
    if not steps:
        return ""
    head = [f"{step['title']} ({_time(step['tools']['nothing']['step_s'])})" for step in steps]
    titles = {name: tool["title"] for step in steps for name, tool in step["tools"].items()}
    titles.pop("nothing")
    rows = [
        (title, *(_added(step["tools"].get(name)) for step in steps))
        for name, title in titles.items()
    ]
    return _table(("added to a training step of", *head), rows)


def _added(tool: dict[str, Any] | None) -> str:
    if tool is None:
        return NONE
    seconds, more = tool["added_s"], tool["more"]
    percent = f"{more:+.0%}" if abs(more) >= 0.1 else f"{more:+.1%}"
    low, high = tool["added_quartiles_s"]
    noise = " (noise)" if low <= 0 <= high else ""
    return f"{'-' if seconds < 0 else ''}{_time(abs(seconds))}, {percent}{noise}"


# ---- below the tables ---------------------------------------------------------------------------

_CUDA_LEGEND = (
    "Nx: N times the time of paramstats with `scalars()`; for one tensor, N times the GPU time of "
    "paramstats, without the transfer of the others' results. `_foreach_norm` computes only the "
    "norm, the `.item()` loop runs under `no_grad`, and compilation is not timed. The copy is from "
    "device to device and of the same bytes; its rate counts bytes read and written."
)
_LEGEND = (
    "Nx: N times the time of paramstats with `scalars()`, which returns floats of four statistics "
    "per tensor, as the others do. The `.item()` loop runs under `no_grad`; `_foreach_norm` "
    "computes only the norm; torch.compile takes minutes for more than 64 tensors and is not "
    "measured there. Share of the read-only limit: 1.00 means as fast as a loop that only reads "
    "the same bytes. A dash: not measured. The overhead of a training step is measured against "
    'interleaved steps without a tool; "noise": the middle half of the differences includes zero. '
    "`wandb.watch` makes histograms; `grad_norm` computes only norms of gradients."
)


def _measured_on(report: dict[str, Any]) -> str:
    hardware, versions = report["hardware"], report["versions"]
    runs = "1 run" if report["runs"] == 1 else f"{report['runs']} runs"
    backend = f"{report['backend']} backend"
    if report["simd"] and report["device"] == "cpu":
        backend += f", {report['simd']}"
    return (
        f"Medians of {runs} on {hardware['gpu'] or hardware['cpu']}, {hardware['cores']} cores, "
        f"{hardware['threads']} threads unless stated otherwise; "
        f"paramstats {versions['paramstats']} ({backend}), torch {versions['torch']}, "
        f"Python {versions['python']}, {report['date']}."
    )
