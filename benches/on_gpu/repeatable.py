"""Whether the same tensors give the same bits on every run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import paramstats
from benches.on_gpu.backends import backends, engine_of
from benches.on_gpu.small_tensors import small_tensors


def repeat(source: Any, case: str, backend: str, runs: int) -> dict[str, Any]:
    """How many runs give the first one's bits: summaries compare by the bytes of their states."""
    with engine_of(backend):
        first = paramstats.summarize(source)
        same = 1 + sum(paramstats.summarize(source) == first for _ in range(runs - 1))
    return {"case": case, "backend": backend, "runs": runs, "same": same}


def with_nan(numel: int, device: torch.device) -> torch.Tensor:
    torch.manual_seed(0)
    tensor = torch.randn(numel, device=device)
    tensor[numel // 3] = float("nan")
    tensor[numel // 2] = float("inf")
    return tensor


def measure(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    large = 1 << (28 if device.type == "cuda" else 20)
    sources = {
        "1,000 parameters and their gradients": small_tensors(500, True, device),
        f"{large:,} elements with a NaN": {"x": with_nan(large, device)},
        f"{large:,} elements of bfloat16": {
            "x": torch.randn(large, device=device).to(torch.bfloat16)
        },
    }
    return [
        repeat(source, case, backend, 10)
        for backend in backends(device)
        for case, source in sources.items()
    ]


def lines(row: dict[str, Any]) -> Iterator[str]:
    yield f"{row['backend']}, {row['case']}: {row['same']} of {row['runs']} runs the same"
