"""Of a GPU."""

from __future__ import annotations

from typing import Any

from benches.tables.cells import NONE, duration, measured_on, ratio, table, time, times

_MODEL_HEAD = (
    "parameters and gradients of",
    "paramstats",
    "GPU's time",
    "of the copy's rate",
    "with `scalars()`",
    "`.item()` loop",
    "batched torch",
    "compiled",
    "`_foreach_norm`",
    "reference backend against the loop",
)
_MEMORY_HEAD = (
    "one tensor",
    "paramstats",
    "GPU's time",
    "GB/s",
    "of the copy's rate",
    "batched torch",
    "compiled",
    "`_foreach_norm`",
    "reference backend",
)
_HOST_HEAD = (
    "the call alone",
    "backend",
    "host's time",
    "while the GPU is busy",
    "to the statistics",
    "must",
    "aim",
)
_LAUNCHES_HEAD = ("one call", "backend", "launches", "copies", "waits", "allocations")
_TRAINING_HEAD = ("in a training step of", "", "a step", "more than none")


def render(report: dict[str, Any]) -> str:
    cases = report["cases"].values()
    parts = []
    models = [_model_row(case) for case in cases if case["tensors"] > 1]
    memories = [_memory_row(case) for case in cases if case["tensors"] == 1]
    if models:
        parts.append(table(_MODEL_HEAD, models))
    if memories:
        parts.append(table(_MEMORY_HEAD, memories))
    parts += _on_gpu(report.get("on_gpu", {}))
    return "\n\n".join([*parts, _legend(report)])


def _model_row(case: dict[str, Any]) -> tuple[str, ...]:
    return (
        case["title"],
        duration(case, "paramstats"),
        time(_device_s(case, "paramstats")),
        _share_of_copy(case),
        duration(case, "paramstats_scalars"),
        ratio(case, "item_loop_no_grad", "paramstats_scalars"),
        ratio(case, "batched_torch", "paramstats_scalars"),
        ratio(case, "compiled_torch", "paramstats_scalars"),
        ratio(case, "foreach_norm_only", "paramstats_scalars"),
        ratio(case, "item_loop_no_grad", "paramstats_reference"),
    )


def _memory_row(case: dict[str, Any]) -> tuple[str, ...]:
    seconds = _device_s(case, "paramstats")
    others = ("batched_torch", "compiled_torch", "foreach_norm_only", "paramstats_reference")
    return (
        case["title"],
        duration(case, "paramstats"),
        time(seconds),
        "-" if seconds is None else f"{case['bytes'] / seconds / 1e9:.0f}",
        _share_of_copy(case),
        *(times(_device_s(case, other), seconds) for other in others),
    )


def _device_s(case: dict[str, Any], contestant: str) -> float | None:
    seconds: float | None = case.get("device_s", {}).get(contestant)
    return seconds


def _share_of_copy(case: dict[str, Any]) -> str:
    """Bytes read a second in parts of the bytes that a copy reads and writes a second."""
    copy, seconds = (_device_s(case, name) for name in ("copy", "paramstats"))
    return NONE if copy is None or seconds is None else f"{copy / 2 / seconds:.2f}"


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
            [(row["case"], row["backend"], *(time(row[key]) for key in times)) for row in host],
        ),
        (
            _LAUNCHES_HEAD,
            [(row["case"], row["backend"], *(str(row[key]) for key in counts)) for row in launches],
        ),
        (
            _TRAINING_HEAD,
            [
                (part["title"], look, time(step["median_s"]), f"{step['more']:+.1%}")
                for part in training
                for look, step in part["steps"].items()
            ],
        ),
    ]
    return [table(head, rows) for head, rows in tables if rows]


def _legend(report: dict[str, Any]) -> str:
    return (
        "Nx: takes N times as long as paramstats with `scalars()`; of one tensor, as the call "
        "alone, by the GPU's own clock, and the others leave their statistics there (`_foreach_norm` "
        "gives the norm alone; the loop runs under `no_grad`; compiled: batched torch under "
        "`torch.compile`, whose compilation is not timed). The copy is from device to device, of "
        "the same bytes; its rate counts bytes read and written, and 1.00 is as fast. "
        f"{measured_on(report)}"
    )
