"""Renders the tables of docs/benchmarks.md from the medians that benches.report collects.

Every ratio is printed, also where another contestant is faster than paramstats.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benches import cells
from benches.cells import NONE, Case, Cell
from benches.hardware import PEERS
from docs import blocks

_MOSTLY_CALL = 1 << 18
"""Bytes below which the overhead of the call is larger than the time to read the memory."""


def render(report: dict[str, Any]) -> str:
    """Return the tables and a legend in Markdown."""
    on_gpu = report["device"] == "cuda"
    cases = report["cases"].values()
    several = [case for case in cases if case["tensors"] > 1]
    single = [case for case in cases if case["tensors"] == 1]
    parts = [_table_of(_CUDA_MODEL_COLUMNS if on_gpu else _MODEL_COLUMNS, several)]
    if on_gpu:
        parts.append(_table_of(_CUDA_TENSOR_COLUMNS, single))
    else:
        parts += [_tensor_table(single), _peer_table(single)]
    calls = report.get("on_gpu", {}).get("calls")
    if isinstance(calls, list):  # else that part failed
        parts.append(_table_of(_CALL_COLUMNS, calls))
    parts.append(_step_table(report.get("step_cost", {})))
    parts.append(_turns_table(report.get("in_turns", {})))
    parts.append(f"{_CUDA_LEGEND if on_gpu else _LEGEND} {_measured_on(report)}")
    return "\n\n".join(filter(None, parts))


# ---- tables with one row per case ---------------------------------------------------------------

Columns = tuple[tuple[str, Cell], ...]

_MODEL_COLUMNS: Columns = (
    ("parameters and gradients of", cells.text("title")),
    ("`summarize(m)`", cells.time_of_summarize),
    ("`.scalars()`", cells.median("scalars")),
    ("`.total.grad.norm`", cells.median("total_grad_norm")),
    ("one statistic", cells.median("one_statistic")),
    ("`.item()` loop", cells.relative("item_loop")),
    ("batched torch", cells.relative("batched_torch")),
    ("compiled torch", cells.relative("compiled_torch")),
    ("NumPy", cells.relative("numpy")),
    ("lovely-tensors", cells.relative("lovely_tensors")),
    ("`_foreach_norm`", cells.relative("foreach_norm_only")),
    (
        "`get_total_norm`, relative to `.total.grad.norm`",
        cells.relative("get_total_norm", "total_grad_norm"),
    ),
    ("share of the read-only limit", cells.share_of_limit),
    (
        "`.item()` loop, relative to `.scalars()` of the reference backend",
        cells.relative("item_loop", "reference_scalars"),
    ),
)
_CUDA_MODEL_COLUMNS: Columns = (
    *_MODEL_COLUMNS[:2],
    ("GPU time", lambda case: cells.time_text(cells.device_s(case, "paramstats"))),
    ("share of the copy's rate", cells.share_of_copy),
    *_MODEL_COLUMNS[2:],
)
_CUDA_TENSOR_COLUMNS: Columns = (
    ("one tensor", cells.text("title")),
    ("`summarize(m)`", cells.time_of_summarize),
    ("GPU time", lambda case: cells.time_text(cells.device_s(case, "paramstats"))),
    ("GB/s", lambda case: cells.rate(case, cells.device_s(case, "paramstats"))),
    ("share of the copy's rate", cells.share_of_copy),
    ("batched torch", cells.relative_on_device("batched_torch")),
    ("compiled torch", cells.relative_on_device("compiled_torch")),
    ("`_foreach_norm`", cells.relative_on_device("foreach_norm_only")),
    ("reference backend", cells.relative_on_device("reference_scalars")),
)
_CALL_COLUMNS: Columns = (
    ("one call (native: at most 150 us of host time for 1,000 tensors)", cells.text("case")),
    ("backend", cells.text("backend")),
    ("host time", lambda row: cells.time_text(row["host_s"])),
    ("while the GPU is busy", lambda row: cells.time_text(row.get("busy_s"))),
    ("until statistics can be read", lambda row: cells.time_text(row["complete_s"])),
    *((key, cells.text(key)) for key in ("launches", "copies", "waits", "allocations")),
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


_PEERS = {"numkong": "NumKong", "polars": "polars", "batched_torch": "torch"}


def _tensor_table(cases: list[Case]) -> str:
    return _by_size("one tensor", cases, {"": cells.share_and_rate})


def _peer_table(cases: list[Case]) -> str:
    peers = {f", {title}": cells.relative(name) for name, title in _PEERS.items()}
    return _by_size("one tensor, time relative to paramstats with `.scalars()`", cases, peers)


def _by_size(title: str, cases: list[Case], by_suffix: dict[str, Cell]) -> str:
    """Return rows for each dtype, one per suffix in `by_suffix`, but none without a value."""
    columns = sorted({(case["bytes"], case["threads"]) for case in cases})
    sizes, by_dtype = {}, {}
    for case in cases:
        sizes[case["bytes"]], dtype = size_and_dtype(case)
        by_dtype[dtype, (case["bytes"], case["threads"])] = case
    head = []
    for nbytes, threads in columns:
        only_one = sum(other == nbytes for other, _ in columns) == 1
        suffix = "" if only_one else f", {threads} thread{'s' if threads > 1 else ''}"
        note = " (mostly overhead of the call)" if nbytes < _MOSTLY_CALL else ""
        head.append(f"{sizes[nbytes]}{suffix}{note}")
    rows = []
    for dtype in in_order(dtype for dtype, _ in by_dtype):
        for suffix, cell in by_suffix.items():
            found = [by_dtype.get((dtype, at)) for at in columns]
            row = [NONE if case is None else cell(case) for case in found]
            if set(row) != {NONE}:
                rows.append((f"{dtype}{suffix}", *row))
    return _table((title, *head), rows) if rows else ""


def size_and_dtype(case: Case) -> tuple[str, str]:
    """Split a title: "1 GiB of float32" gives ("1 GiB", "float32")."""
    size, _, dtype = case["title"].partition(" of ")
    return size, dtype


def in_order(dtypes: Iterable[str]) -> list[str]:
    """Remove duplicates; put dtypes with a SIMD level ("float32, avx2") last."""
    return sorted(dict.fromkeys(dtypes), key=lambda dtype: "," in dtype)


# ---- training steps: one row per tool, one column per training ----------------------------------


def _step_table(report: dict[str, Any]) -> str:
    """Return a table of all trainings, and when they were measured."""
    steps = list(report.get("steps", {}).values())
    if not steps:
        return ""
    head = [
        f"{step['title']} ({cells.time_text(step['tools']['nothing']['step_s'])})" for step in steps
    ]
    titles = {name: tool["title"] for step in steps for name, tool in step["tools"].items()}
    titles.pop("nothing")
    rows = [
        (title, *(_added(step["tools"].get(name)) for step in steps))
        for name, title in titles.items()
    ]
    table = _table(("added to a training step of", *head), rows)
    simd = f", {report['simd']}" if report["simd"] else ""
    return f"{table}\n\nTraining steps: {report['date']}{simd}."


def _added(tool: dict[str, Any] | None) -> str:
    if tool is None:
        return NONE
    seconds, more = tool["added_s"], tool["more"]
    percent = f"{more:+.0%}" if abs(more) >= 0.1 else f"{more:+.1%}"
    low, high = tool["added_quartiles_s"]
    noise = " (noise)" if low <= 0 <= high else ""
    return f"{'-' if seconds < 0 else ''}{cells.time_text(abs(seconds))}, {percent}{noise}"


# ---- alternating calls: one row per comparison --------------------------------------------------


def _turns_table(groups: dict[str, Any]) -> str:
    """Return a table of all groups, and the dates on which they were measured."""
    rows = [
        (row["of"], row["call"], row["base"] or NONE, cells.ratio(row, "median"),
         f"{cells.ratio(row, 'low')} to {cells.ratio(row, 'high')}")
        for group in groups.values()
        for row in group["rows"]
    ]  # fmt: skip
    if not rows:
        return ""
    head = ("alternating calls", "time of", "relative to", "median", "middle half of the turns")
    dates = ", ".join(sorted({group["date"] for group in groups.values()}))
    table = blocks.table(head, rows, right=(3, 4))
    return f"{table}\n\nAlternating calls: ratios of neighboring calls, {dates}."


# ---- below the tables ---------------------------------------------------------------------------

_CALLS = (
    "`m` is the model; one statistic is `summarize(m)[name].grad.norm` of its first parameter. Nx: "
    "N times the time of paramstats with `.scalars()`, which returns floats of four statistics per "
    "tensor, as the others do, and of the totals. The `.item()` loop runs under `no_grad`, "
    "`_foreach_norm` computes only the norms, and `torch.nn.utils.get_total_norm` only the norm of "
    "all gradients. "
)
_CUDA_LEGEND = (
    f"{_CALLS}For one tensor, Nx is N times the GPU time of paramstats, without the transfer of "
    "the others' results. Compilation is not timed. The copy is from device to device and of the "
    "same bytes; its rate counts bytes read and written."
)
_LEGEND = (
    f"{_CALLS}torch.compile takes minutes for more than 64 tensors and is not measured there. "
    "Share of the read-only limit: 1.00 means as fast as a loop that only reads the same bytes. A "
    "dash: not measured; wrong: an error above 1 %, so not timed. For one tensor, NumKong computes "
    "sum, sum of squares, minimum and maximum with one thread; polars mean, std, minimum and "
    "maximum; torch mean, std, norm and zero fraction; only paramstats counts NaN and infinities. "
    "The overhead of a training step is measured against interleaved steps without a tool; "
    '"noise": the middle half of the differences includes zero. `wandb.watch`, TensorBoard and '
    "`torch.histc` make histograms; `grad_norm` computes only norms of gradients."
)


def _measured_on(report: dict[str, Any]) -> str:
    hardware, versions = report["hardware"], report["versions"]
    runs = "1 run" if report["runs"] == 1 else f"{report['runs']} runs"
    backend = f"{report['backend']} backend"
    if report["simd"] and report["device"] == "cpu":
        backend += f", {report['simd']}"
    peers = "".join(f", {name} {versions[name]}" for name in PEERS if name in versions)
    return (
        f"Medians of {runs} on {hardware['gpu'] or hardware['cpu']}, {hardware['cores']} cores, "
        f"{hardware['threads']} threads unless stated otherwise; "
        f"paramstats {versions['paramstats']} ({backend}), torch {versions['torch']}, "
        f"Python {versions['python']}{peers}, {report['date']}."
    )
