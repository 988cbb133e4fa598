"""The README's tables, in Markdown, from the medians that benches.report collected.

A row for each model, each type of elements and each tool. Every ratio is printed as it is, losses
too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from docs import blocks


def render(report: dict[str, Any]) -> str:
    """The tables in Markdown, and under them what they were measured on."""
    if report["device"] == "cuda":
        return _render_cuda(report)
    cases = report["cases"].values()
    models = [case for case in cases if case["tensors"] > 1]
    memories = [case for case in cases if case["tensors"] == 1]
    parts = []
    if models:
        columns = [[head, *map(cell, models)] for head, cell in _MODEL_COLUMNS]
        shown = [column for column in columns if set(column[1:]) != {_NONE}]
        head, *rows = zip(*shown, strict=True)
        parts.append(_table(head, rows))
    if memories:
        parts.append(_memory_table(memories))
    steps = list(report.get("step_cost", {}).get("steps", {}).values())
    if steps:
        parts.append(_step_table(steps))
    return "\n\n".join([*parts, _legend(report)])


_NONE = "-"
"""Not measured."""

_MOSTLY_CALL = 1 << 18
"""Bytes that are read in less time than it takes to call for it."""

_MANY = 1000
"""Tensors from which on it says what one takes."""

Cell = Callable[[dict[str, Any]], str]


def _times_as_long(contestant: str, base: str = "paramstats_scalars") -> Cell:
    """To the last float, as those others give them."""
    return lambda case: _ratio(case, contestant, base)


def _paramstats(case: dict[str, Any]) -> str:
    seconds = case["median_s"].get("paramstats")
    if seconds is None or case["tensors"] < _MANY:
        return _time(seconds)
    return f"{_time(seconds)} ({seconds / case['tensors'] * 1e9:.0f} ns a tensor)"


_MODEL_COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("parameters and gradients of", lambda case: str(case["title"])),
    ("paramstats", _paramstats),
    ("with `scalars()`", lambda case: _duration(case, "paramstats_scalars")),
    ("`.item()` loop", _times_as_long("item_loop_no_grad")),
    ("batched torch", _times_as_long("batched_torch")),
    ("compiled torch", _times_as_long("compiled_torch")),
    ("NumPy", _times_as_long("numpy")),
    ("lovely-tensors", _times_as_long("lovely_tensors")),
    ("`_foreach_norm`", _times_as_long("foreach_norm_only")),
    ("of the read-only limit", lambda case: _share(case)),
    (
        "reference engine against the loop",
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
    rows = [(dtype, *(cells.get((dtype, at), _NONE) for at in columns)) for dtype in dtypes]
    return _table(("one tensor", *head), rows)


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
        return _NONE
    return f"{_share(case)} ({case['bytes'] / seconds / 1e9:.0f} GB/s)"


def _step_table(steps: list[dict[str, Any]]) -> str:
    """A row for each tool, a column for each training."""
    head = [f"{step['title']} ({_time(step['tools']['nothing']['step_s'])})" for step in steps]
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
    return _table(("added to a training step of", *head), rows)


def _added(tool: dict[str, Any] | None) -> str:
    if tool is None:
        return _NONE
    seconds, more = tool["added_s"], tool["more"]
    percent = f"{more:+.0%}" if abs(more) >= 0.1 else f"{more:+.1%}"
    low, high = tool["added_quartiles_s"]
    noise = " (noise)" if low <= 0 <= high else ""
    return f"{'-' if seconds < 0 else ''}{_time(abs(seconds))}, {percent}{noise}"


def _duration(case: dict[str, Any], contestant: str) -> str:
    return _time(case["median_s"].get(contestant))


def _time(seconds: float | None) -> str:
    if seconds is None:
        return _NONE
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _ratio(case: dict[str, Any], contestant: str, base: str) -> str:
    """How many times `base`'s time `contestant` takes."""
    return _times(*(case["median_s"].get(name) for name in (contestant, base)))


def _times(seconds: float | None, one: float | None) -> str:
    if seconds is None or one is None:
        return _NONE
    ratio = seconds / one
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2g}x"


def _share(case: dict[str, Any]) -> str:
    """The read-only loop's time in parts of paramstats'."""
    limit, seconds = (case["median_s"].get(name) for name in ("read_only", "paramstats"))
    return _NONE if limit is None or seconds is None else f"{limit / seconds:.2f}"


# ---- on a GPU -----------------------------------------------------------------------------------

_CUDA_MODEL_HEAD = (
    "parameters and gradients of",
    "paramstats",
    "GPU's time",
    "of the copy's rate",
    "with `scalars()`",
    "`.item()` loop",
    "batched torch",
    "compiled",
    "`_foreach_norm`",
    "reference engine against the loop",
)
_CUDA_MEMORY_HEAD = (
    "one tensor",
    "paramstats",
    "GPU's time",
    "GB/s",
    "of the copy's rate",
    "batched torch",
    "compiled",
    "`_foreach_norm`",
    "reference engine",
)
_HOST_HEAD = (
    "the call alone",
    "engine",
    "host's time",
    "while the GPU is busy",
    "to the figures",
    "must",
    "aim",
)
_LAUNCHES_HEAD = ("one call", "engine", "launches", "copies", "waits", "allocations")
_TRAINING_HEAD = ("in a training step of", "", "a step", "more than none")


def _render_cuda(report: dict[str, Any]) -> str:
    cases = report["cases"].values()
    parts = []
    models = [_cuda_model_row(case) for case in cases if case["tensors"] > 1]
    memories = [_cuda_memory_row(case) for case in cases if case["tensors"] == 1]
    if models:
        parts.append(_table(_CUDA_MODEL_HEAD, models))
    if memories:
        parts.append(_table(_CUDA_MEMORY_HEAD, memories))
    parts += _on_gpu(report.get("on_gpu", {}))
    return "\n\n".join([*parts, _cuda_legend(report)])


def _cuda_model_row(case: dict[str, Any]) -> tuple[str, ...]:
    return (
        case["title"],
        _duration(case, "paramstats"),
        _time(_device_s(case, "paramstats")),
        _share_of_copy(case),
        _duration(case, "paramstats_scalars"),
        _ratio(case, "item_loop_no_grad", "paramstats_scalars"),
        _ratio(case, "batched_torch", "paramstats_scalars"),
        _ratio(case, "compiled_torch", "paramstats_scalars"),
        _ratio(case, "foreach_norm_only", "paramstats_scalars"),
        _ratio(case, "item_loop_no_grad", "paramstats_reference"),
    )


def _cuda_memory_row(case: dict[str, Any]) -> tuple[str, ...]:
    seconds = _device_s(case, "paramstats")
    others = ("batched_torch", "compiled_torch", "foreach_norm_only", "paramstats_reference")
    return (
        case["title"],
        _duration(case, "paramstats"),
        _time(seconds),
        "-" if seconds is None else f"{case['bytes'] / seconds / 1e9:.0f}",
        _share_of_copy(case),
        *(_times(_device_s(case, other), seconds) for other in others),
    )


def _device_s(case: dict[str, Any], contestant: str) -> float | None:
    seconds: float | None = case.get("device_s", {}).get(contestant)
    return seconds


def _share_of_copy(case: dict[str, Any]) -> str:
    """Bytes read a second in parts of the bytes that a copy reads and writes a second."""
    copy, seconds = (_device_s(case, name) for name in ("copy", "paramstats"))
    return _NONE if copy is None or seconds is None else f"{copy / 2 / seconds:.2f}"


def _on_gpu(found: dict[str, Any]) -> list[str]:
    """Tables of what benches.on_gpu found; a part that failed has none."""
    host, launches, training = (
        rows if isinstance(rows := found.get(name), list) else []
        for name in ("host_time", "launches", "training")
    )
    times = ("median_s", "busy_s", "complete_s", "must_s", "aim_s")
    counts = ("launches", "copies", "waits", "allocations")
    tables: list[tuple[tuple[str, ...], list[tuple[str, ...]]]] = [
        (
            _HOST_HEAD,
            [(row["case"], row["engine"], *(_time(row[key]) for key in times)) for row in host],
        ),
        (
            _LAUNCHES_HEAD,
            [(row["case"], row["engine"], *(str(row[key]) for key in counts)) for row in launches],
        ),
        (
            _TRAINING_HEAD,
            [
                (part["title"], look, _time(step["median_s"]), f"{step['more']:+.1%}")
                for part in training
                for look, step in part["steps"].items()
            ],
        ),
    ]
    return [_table(head, rows) for head, rows in tables if rows]


def _cuda_legend(report: dict[str, Any]) -> str:
    return (
        "Nx: takes N times as long as paramstats with `scalars()`; of one tensor, as the call "
        "alone, by the GPU's own clock, and the others leave their figures there (`_foreach_norm` "
        "gives the norm alone; the loop runs under `no_grad`; compiled: batched torch under "
        "`torch.compile`, whose compilation is not timed). The copy is from device to device, of "
        "the same bytes; its rate counts bytes read and written, and 1.00 is as fast. "
        f"{_measured_on(report)}"
    )


# ---- both ---------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return blocks.table(head, rows, right=range(1, len(head)))


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
        "figures of each tensor, as the others do (the loop under `no_grad`; `_foreach_norm` gives "
        "the norm alone; compiled torch: up to 64 tensors, beyond which compiling takes minutes). "
        "The limit "
        "is a loop that only reads the same bytes; 1.00 is as fast. "
        f"{steps}{_measured_on(report)}"
    )


def _measured_on(report: dict[str, Any]) -> str:
    hardware, versions = report["hardware"], report["versions"]
    runs = "1 run" if report["runs"] == 1 else f"{report['runs']} runs"
    engine = f"{report['engine']} engine"
    if report["simd"] and report["device"] == "cpu":
        engine += f", {report['simd']}"
    return (
        f"Medians of {runs} on {hardware['gpu'] or hardware['cpu']}, {hardware['cores']} cores, "
        f"{hardware['threads']} threads where no other number is given; "
        f"paramstats {versions['paramstats']} ({engine}), torch {versions['torch']}, "
        f"Python {versions['python']}, {report['date']}."
    )
