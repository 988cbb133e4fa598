"""The README's tables, in Markdown, from the medians that benches.report collected.

A row for each model and each tensor. Every ratio is printed as it is, losses too.
"""

from __future__ import annotations

from typing import Any


def render(report: dict[str, Any]) -> str:
    """The tables in Markdown, and under them what they were measured on."""
    cases = report["cases"].values()
    models = [_model_row(case) for case in cases if case["tensors"] > 1]
    memories = [_memory_row(case) for case in cases if case["tensors"] == 1]
    parts = []
    if models:
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
    seconds = case["median_s"].get(contestant)
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _ratio(case: dict[str, Any], contestant: str, base: str) -> str:
    """How many times `base`'s time `contestant` takes."""
    seconds, one = (case["median_s"].get(name) for name in (contestant, base))
    if seconds is None or one is None:
        return "-"
    ratio = seconds / one
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2g}x"


def _share(case: dict[str, Any]) -> str:
    """The read-only loop's time in parts of paramstats'."""
    limit, seconds = (case["median_s"].get(name) for name in ("read_only", "paramstats"))
    return "-" if limit is None or seconds is None else f"{limit / seconds:.2f}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    rule = ("---", *("---:" for _ in head[1:]))
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def _legend(report: dict[str, Any]) -> str:
    hardware, versions = report["hardware"], report["versions"]
    runs = "1 run" if report["runs"] == 1 else f"{report['runs']} runs"
    engine = report["engine"] + (f" engine, {report['simd']}" if report["simd"] else " engine")
    return (
        "Nx: takes N times as long as paramstats (the loop under `no_grad`; `_foreach_norm` gives "
        "the norm alone). The limit is a loop that only reads the same bytes; 1.00 is as fast. "
        f"Medians of {runs} on {hardware['gpu'] or hardware['cpu']}, {hardware['cores']} cores, "
        f"{hardware['threads']} threads where no other number is given; "
        f"paramstats {versions['paramstats']} ({engine}), torch {versions['torch']}, "
        f"Python {versions['python']}, {report['date']}."
    )
