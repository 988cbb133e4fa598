"""Measures what one call costs on a GPU: GPU time, host time and the CUDA calls that it makes.

    python -m benches.on_gpu --json FILE         write the results for benches.report
    python -m benches.on_gpu --only smoke        correctness and GPU time of large tensors, 10 s

Without a CUDA device the exit status is 2. The functions also run on the CPU, for their tests.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import paramstats
from benches import checks, hardware, models, timing
from benches.contestants import PARAMSTATS, from_summary

Row = dict[str, Any]

_WARM_UP = 5
_CALLS = {"native": 1000, "reference": 10}
"""Timed calls by backend. The reference backend launches about 30 kernels per tensor."""

_MUST, _AIM = 150e-6, 60e-6
"""Targets in seconds for the host time of a native call over 1,000 tensors."""

_BUSY_SECONDS = 0.02

_SMALL = {
    "1,000 parameters, no gradients": (500, False),
    "500 parameters and their gradients": (250, True),
    "1,000 parameters and their gradients": (500, True),
}
"""Arguments of `small_tensors` by name."""


def small_tensors(layers: int, gradients: bool, device: torch.device) -> nn.Module:
    """Return a model with two parameters per layer, of 256 and of 16 elements."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers))).to(device)
    if gradients:
        for p in model.parameters():
            p.grad = torch.randn_like(p)
    return model


def _each_case(device: torch.device) -> Iterator[tuple[Row, nn.Module]]:
    """Yield a row to be filled and a model, with each backend; warm up before."""
    for backend in timing.available_backends(device):
        for case, arguments in _SMALL.items():
            model = small_tensors(*arguments, device)
            with timing.use_backend(backend):
                for _ in range(_WARM_UP):
                    paramstats.summarize(model).wait()
                yield (
                    {"case": case, "backend": backend, "tensors": len(models.tensors(model))},
                    model,
                )


# ---- large tensors: correctness and GPU time ----------------------------------------------------


def smoke(device: torch.device) -> Iterator[Row]:
    """Check one large tensor of four dtypes, and compare its GPU time with a copy's."""
    for gib, dtype in (
        (2, torch.float32),
        (2, torch.bfloat16),
        (1, torch.float8_e4m3fn),
        (1, torch.int8),
    ):
        nbytes = gib << (30 if device.type == "cuda" else 16)
        source = {"x": models.filled(nbytes // dtype.itemsize, dtype, device)}
        call = partial(paramstats.summarize, source)
        checks.check(from_summary(call()), checks.expected(source), PARAMSTATS)
        seconds = timing.seconds(call, device)
        copy = timing.seconds(partial(torch.empty_like(source["x"]).copy_, source["x"]), device)
        events = count_calls(trace(call, device))
        yield {
            "case": f"{nbytes:,} bytes of {dtype}",
            "device_s": seconds,
            "copy_s": copy,
            "share_of_copy": copy / 2 / seconds,
            "kernels_us": events["device_us"],
        }


# ---- host time ----------------------------------------------------------------------------------


def host_time(device: torch.device) -> Iterator[Row]:
    """Time the host until a call over small tensors returns, and until its results are readable."""
    for row, model in _each_case(device):
        calls = _CALLS[row["backend"]]
        returned, complete = _timed_calls(model, calls, device, lambda: None)
        row |= {"median_s": returned, "complete_s": complete, "busy_s": None}
        if device.type == "cuda":
            keep_busy = partial(torch.cuda._sleep, int(_BUSY_SECONDS * timing.CYCLES_PER_SECOND))
            few = max(_WARM_UP, calls // 10)
            row["busy_s"], _ = _timed_calls(model, few, device, keep_busy)
        has_target = row["backend"] == "native" and row["tensors"] == 1000
        row |= {"must_s": _MUST, "aim_s": _AIM} if has_target else {"must_s": None, "aim_s": None}
        yield row


def _timed_calls(
    model: nn.Module, calls: int, device: torch.device, before: Callable[[], None]
) -> tuple[float, float]:
    """Return the median seconds until a call returned, and until its results were readable."""
    returned, complete = [], []
    for _ in range(calls):
        timing.synchronize(device)
        before()
        begin = time.perf_counter()
        summary = paramstats.summarize(model)
        returned.append(time.perf_counter() - begin)
        summary.wait()
        complete.append(time.perf_counter() - begin)
    return statistics.median(returned), statistics.median(complete)


# ---- CUDA calls ---------------------------------------------------------------------------------

_REGION = "paramstats: one call"

_KINDS = {
    "launches": ("cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cudaGraphLaunch",
                 "cuLaunchKernel"),
    "copies": ("cudaMemcpyAsync", "cudaMemcpy2DAsync", "cuMemcpyAsync", "cuMemcpyHtoDAsync",
               "cuMemcpyDtoHAsync", "cuMemcpyDtoDAsync"),
    "waits": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize",
              "cudaMemcpy", "cudaMemcpy2D", "cudaMemset", "cudaFree", "cudaFreeHost",
              "cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize", "cuMemcpyHtoD",
              "cuMemcpyDtoH"),
    "allocations": ("cudaMalloc", "cudaMallocAsync", "cudaHostAlloc", "cudaMallocHost",
                    "cuMemCreate", "cuMemAlloc", "cudaHostRegister"),
}  # fmt: skip
"""Names of CUDA functions by what they do."""


def launches(device: torch.device) -> Iterator[Row]:
    """Count the CUDA calls of one call over small tensors."""
    for row, model in _each_case(device):
        yield {**row, **count_calls(trace(partial(paramstats.summarize, model), device))}


def trace(call: Callable[[], paramstats.Summary], device: torch.device) -> list[dict[str, Any]]:
    """Return the profiler's events of one call, after another call as a warm-up."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    timing.synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        call().wait()
        timing.synchronize(device)
        with torch.profiler.record_function(_REGION):
            summary = call()
        summary.wait()
        timing.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]  # type: ignore[no-any-return]


def count_calls(events: Sequence[dict[str, Any]], region: str = _REGION) -> dict[str, Any]:
    """Count the CUDA calls within a region, and add up the time of the GPU work they queued."""
    inside = [e for e in events if e.get("name") == region and e.get("cat") == "user_annotation"]
    if len(inside) != 1:
        raise ValueError(f"expected one region '{region}' in the trace, got {len(inside)}")
    begin = float(inside[0]["ts"])
    end = begin + float(inside[0]["dur"])
    calls = [
        e
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and begin <= float(e["ts"]) < end
    ]
    correlations = {e["args"].get("correlation") for e in calls}
    device_us: Counter[str] = Counter()
    for e in events:
        is_device_work = e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        if is_device_work and e["args"].get("correlation") in correlations:
            device_us[str(e["name"])] += e["dur"]
    names = Counter(_without_suffix(str(e["name"])) for e in calls)
    counts = {kind: sum(names[name] for name in wanted) for kind, wanted in _KINDS.items()}
    return {**counts, "runtime_calls": dict(names), "device_us": dict(device_us)}


def _without_suffix(name: str) -> str:
    """Strip versions: cudaLaunchKernelExC_v11060 becomes cudaLaunchKernel."""
    return name.partition("_")[0].removesuffix("ExC").removesuffix("Ex")


# ---- command line -------------------------------------------------------------------------------

PARTS = {"smoke": smoke, "host_time": host_time, "launches": launches}


def text(row: Row) -> str:
    """Return a row as one line; times are in microseconds."""
    cells = []
    for key, value in row.items():
        if key.endswith("_s") and value is not None:
            cells.append(f"{key.removesuffix('_s')} {value * 1e6:.1f} us")
        elif key != "runtime_calls" and value is not None:
            cells.append(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(cells)


def main() -> int:
    parser = argparse.ArgumentParser("python -m benches.on_gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--only", choices=PARTS, help="one part")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"benches.on_gpu: torch {torch.__version__} finds no CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    torch.cuda.init()  # paramstats.backend() does not initialize CUDA
    report: dict[str, Any] = {**hardware.describe("cuda"), "parts": {}}
    print(paramstats.backend(), report["hardware"], sep="\n", flush=True)
    failed = False
    for name in [options.only] if options.only else PARTS:
        rows = report["parts"][name] = []
        try:
            for row in PARTS[name](device):
                rows.append(row)
                print(text(row), flush=True)
        except Exception as error:  # continue with the other parts
            failed = True
            report["parts"][name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"{name}: FAILED, {type(error).__name__}: {error}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
