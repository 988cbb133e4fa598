"""The README's tables, in Markdown, from the medians that benches.report collected.

A row for each model and each tensor. Every ratio is printed as it is, losses too.
"""

from __future__ import annotations

from typing import Any


def render(report: dict[str, Any]) -> str:
    """The tables in Markdown, and under them what they were measured on."""
    if report["device"] == "cuda":
        return _render_cuda(report)
    cases = report["cases"].values()
    models = [_model_row(case) for case in cases if case["tensors"] > 1]
    memories = [_memory_row(case) for case in cases if case["tensors"] == 1]
    parts = []
    if any("compiled_torch" in case["median_s"] for case in cases):
        compiled = [_ratio(c, "compiled_torch", "paramstats") for c in cases if c["tensors"] > 1]
        models = [(*row, ratio) for row, ratio in zip(models, compiled, strict=True)]
        parts.append(_table((*_MODEL_HEAD, "compiled torch"), models))
    elif models:
        parts.append(_table(_MODEL_HEAD, models))
    if memories:
        parts.append(_table(_MEMORY_HEAD, memories))
    return "\n\n".join([*parts, _legend(report)])


_MODEL_HEAD = (
    "parameters and gradients of",
    "paramstats",
    "GB/s",
    "with `scalars()`",
    "`.item()` loop",
    "batched torch",
    "`_foreach_norm`",
    "of the read-only limit",
    "reference engine against the loop",
)
_MEMORY_HEAD = ("one tensor", "threads", "paramstats", "GB/s", "of the read-only limit")


def _model_row(case: dict[str, Any]) -> tuple[str, ...]:
    return (
        case["title"],
        *_speed(case),
        _duration(case, "paramstats_scalars"),
        _ratio(case, "item_loop_no_grad", "paramstats"),
        _ratio(case, "batched_torch", "paramstats"),
        _ratio(case, "foreach_norm_only", "paramstats"),
        _share(case),
        _ratio(case, "item_loop_no_grad", "paramstats_reference"),
    )


def _memory_row(case: dict[str, Any]) -> tuple[str, ...]:
    return (case["title"], str(case["threads"]), *_speed(case), _share(case))


def _speed(case: dict[str, Any]) -> tuple[str, str]:
    seconds = case["median_s"].get("paramstats")
    rate = "-" if seconds is None else f"{case['bytes'] / seconds / 1e9:.1f}"
    return _duration(case, "paramstats"), rate


def _duration(case: dict[str, Any], contestant: str) -> str:
    return _time(case["median_s"].get(contestant))


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _ratio(case: dict[str, Any], contestant: str, base: str) -> str:
    """How many times `base`'s time `contestant` takes."""
    return _times(*(case["median_s"].get(name) for name in (contestant, base)))


def _times(seconds: float | None, one: float | None) -> str:
    if seconds is None or one is None:
        return "-"
    ratio = seconds / one
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2g}x"


def _share(case: dict[str, Any]) -> str:
    """The read-only loop's time in parts of paramstats'."""
    limit, seconds = (case["median_s"].get(name) for name in ("read_only", "paramstats"))
    return "-" if limit is None or seconds is None else f"{limit / seconds:.2f}"


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
        _ratio(case, "item_loop_no_grad", "paramstats"),
        _ratio(case, "batched_torch", "paramstats"),
        _ratio(case, "compiled_torch", "paramstats"),
        _ratio(case, "foreach_norm_only", "paramstats"),
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
    return "-" if copy is None or seconds is None else f"{copy / 2 / seconds:.2f}"


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
        "Nx: takes N times as long as paramstats; of one tensor by the GPU's own clock, and the "
        "others leave their figures there (`_foreach_norm` gives the norm alone; the loop runs "
        "under `no_grad`; compiled: batched torch under `torch.compile`, whose compilation is not "
        "timed). The copy is from device to device, of the same bytes; its rate counts bytes read "
        "and written, and 1.00 is as fast. "
        f"{_measured_on(report)}"
    )


# ---- both ---------------------------------------------------------------------------------------


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    rule = ("---", *("---:" for _ in head[1:]))
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def _legend(report: dict[str, Any]) -> str:
    return (
        "Nx: takes N times as long as paramstats (the loop under `no_grad`; `_foreach_norm` gives "
        "the norm alone). The limit is a loop that only reads the same bytes; 1.00 is as fast. "
        f"{_measured_on(report)}"
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
