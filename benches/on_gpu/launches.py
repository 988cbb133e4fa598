"""What one call asks of CUDA, and whether it waits."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import paramstats
from benches import models
from benches.on_gpu.backends import backends, engine_of, synchronize
from benches.on_gpu.small_tensors import CASES, WARM_UP, small_tensors

_REGION = "paramstats: one call"

_LAUNCHES = (
    "cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cudaGraphLaunch", "cuLaunchKernel",
)  # fmt: skip
_COPIES = ("cudaMemcpyAsync", "cudaMemcpy2DAsync", "cuMemcpyAsync", "cuMemcpyHtoDAsync",
           "cuMemcpyDtoHAsync", "cuMemcpyDtoDAsync")  # fmt: skip
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy",
          "cudaMemcpy2D", "cudaMemset", "cudaFree", "cudaFreeHost", "cuStreamSynchronize",
          "cuCtxSynchronize", "cuEventSynchronize", "cuMemcpyHtoD", "cuMemcpyDtoH")  # fmt: skip
_ALLOCATIONS = ("cudaMalloc", "cudaMallocAsync", "cudaHostAlloc", "cudaMallocHost", "cuMemCreate",
                "cuMemAlloc", "cudaHostRegister")  # fmt: skip


@dataclass(frozen=True)
class Launches:
    """What one call asks of CUDA, by the profiler."""

    case: str
    backend: str
    tensors: int
    launches: int
    copies: int
    waits: int
    allocations: int
    pageable_copies: int
    """Which wait, in part, though they are called asynchronous."""
    runtime_calls: dict[str, int]
    device_work: dict[str, int]
    """Kernels and copies that came of it, by name."""
    refused_by_torch: str | None
    """What torch.cuda.set_sync_debug_mode("error") has to say about the call."""


def launches(model: nn.Module, case: str, backend: str, device: torch.device) -> Launches:
    with engine_of(backend):
        for _ in range(WARM_UP):
            paramstats.summarize(model).wait()
        counts = count_calls(trace(lambda: paramstats.summarize(model), device), _REGION)
        refused = refused_by_torch(lambda: paramstats.summarize(model), device)
    return Launches(case, backend, len(models.tensors(model)), **counts, refused_by_torch=refused)


def trace(call: Callable[[], paramstats.Summary], device: torch.device) -> list[dict[str, Any]]:
    """The events of one call, after one that the profiler is warmed up with."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        call().wait()
        synchronize(device)
        with torch.profiler.record_function(_REGION):
            summary = call()
        summary.wait()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]  # type: ignore[no-any-return]


def count_calls(events: Sequence[dict[str, Any]], region: str) -> dict[str, Any]:
    """What the host asked of CUDA within a region, and what came of it on the device."""
    inside = [e for e in events if e.get("name") == region and e.get("cat") == "user_annotation"]
    if len(inside) != 1:
        raise ValueError(f"expected one region '{region}' in the trace, got {len(inside)}")
    begin = float(inside[0]["ts"])
    end = begin + float(inside[0]["dur"])
    asked = [
        e
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and begin <= float(e["ts"]) < end
    ]
    correlations = {e["args"].get("correlation") for e in asked}
    done = Counter(
        str(e["name"])
        for e in events
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        and e["args"].get("correlation") in correlations
    )
    names = Counter(str(e["name"]) for e in asked)

    def total(*wanted: str) -> int:
        return sum(names[name] for name in names if _without_suffix(name) in wanted)

    return {
        "launches": total(*_LAUNCHES),
        "copies": total(*_COPIES),
        "waits": total(*_WAITS),
        "allocations": total(*_ALLOCATIONS),
        "pageable_copies": sum(n for name, n in done.items() if "Pageable" in name),
        "runtime_calls": dict(names),
        "device_work": dict(done),
    }


def _without_suffix(name: str) -> str:
    """cudaLaunchKernel of cudaLaunchKernelExC_v11060, cuMemcpyDtoHAsync of cuMemcpyDtoHAsync_v2."""
    name = name.partition("_")[0]
    return name.removesuffix("ExC").removesuffix("Ex")


def refused_by_torch(call: Callable[[], object], device: torch.device) -> str | None:
    """None where torch saw no wait; a CPU has none."""
    if device.type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return None


def measure(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Of the reference backend the first case alone."""
    found = []
    for backend in backends(device):
        for case in CASES if backend == "native" else list(CASES)[:1]:
            model = small_tensors(*CASES[case], device)
            found.append(asdict(launches(model, case, backend, device)))
    return found


def lines(row: dict[str, Any]) -> Iterator[str]:
    refused = row["refused_by_torch"] or "none"
    yield (
        f"one call, {row['backend']}, {row['case']}: {row['launches']} launches, "
        f"{row['copies']} copies ({row['pageable_copies']} pageable), {row['waits']} waits,"
        f" {row['allocations']} allocations; waits that torch refused: {refused}"
    )
