"""Measures what one call costs on a GPU: GPU time, host time and CUDA calls.

    python -m benches.on_gpu --json FILE         write the results for benches.report
    python -m benches.on_gpu --only smoke        correctness and GPU time of large tensors, 10 s

Without a CUDA device the exit status is 2. The functions also run on the CPU, for their tests.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
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
from benches.contestants import PARAMSTATS, all_of_them, from_summary
from tests.fake_device import scaled

Row = dict[str, Any]

_WARM_UP = scaled(5, 1)
_CALLS = {"native": scaled(1000, 2), "reference": scaled(10, 1)}
"""Timed calls by backend. The reference backend launches about 30 kernels per tensor."""

_BUSY_SECONDS = 0.02

_REPEATS = scaled(10, 2)
"""Calls whose results must have the same bits."""


# ---- large tensors: correctness and GPU time ----------------------------------------------------


_LARGE = ((2, torch.float32), (2, torch.bfloat16), (1, torch.float8_e4m3fn), (1, torch.int8))
"""GiB and dtypes."""


def smoke(device: torch.device) -> Iterator[Row]:
    """Check one large tensor of four dtypes, and compare its GPU time with a copy's.

    Then count the CUDA calls of one call, and compare the bits of several calls.
    """
    for gib, dtype in _LARGE:
        nbytes = scaled(gib << 30) if device.type == "cuda" else gib << 16
        source = {"x": models.filled(nbytes // dtype.itemsize, dtype, device)}
        call = partial(paramstats.summarize, source)
        checks.check(from_summary(call()), checks.expected(source), PARAMSTATS, all_of_them)
        row: Row = {"case": f"{nbytes:,} bytes of {dtype}"}
        if device.type == "cuda":
            copy = partial(torch.empty_like(source["x"]).copy_, source["x"])
            seconds, copy_seconds = timing.device_seconds(call), timing.device_seconds(copy)
            row |= {
                "device_s": seconds,
                "copy_s": copy_seconds,
                "share_of_copy": copy_seconds / 2 / seconds,
            }
        yield {**row, "kernels_us": count_calls(trace(call, device))["device_us"]}
    yield contract(device)


def contract(device: torch.device) -> Row:
    """Count the CUDA calls of one call. Raises AssertionError if the bits of two calls differ."""
    tensors = {str(dtype): models.filled(100_003, dtype, device) for _, dtype in _LARGE}
    call = partial(paramstats.summarize, tensors)
    results = {pickle.dumps(call()) for _ in range(_REPEATS)}
    assert len(results) == 1, f"{_REPEATS} calls gave {len(results)} different results"
    counts = count_calls(trace(call, device))
    if device.type == "cuda" and paramstats.backend().cuda == "native":
        assert 1 <= counts["launches"] <= 2 and counts["waits"] == 0, counts
    return {"case": f"{_REPEATS} calls gave the same bits", **counts}


# ---- small tensors: host time and CUDA calls ----------------------------------------------------


_MANY = {
    "1,000 parameters and their gradients": "tensors_of_16",
    "1,000 parameters, no gradients": "tensors_of_16",
    "5,000 parameters and their gradients": "tensors_of_100",
}
"""Cases and their models."""


def calls(device: torch.device) -> Iterator[Row]:
    """Measure the host time and count the CUDA calls of one call, with each backend."""
    for backend in timing.available_backends(device):
        for case, name in _MANY.items():
            model = models.by_name(name, device)
            if "no gradients" in case:
                model.zero_grad(set_to_none=True)
            row: Row = {"case": case, "backend": backend}
            with timing.use_backend(backend):
                _timed_calls(model, _WARM_UP, device)
                number = _CALLS[backend]
                row["host_s"], row["complete_s"] = _timed_calls(model, number, device)
                if device.type == "cuda":
                    row["busy_s"], _ = _timed_calls(
                        model, max(_WARM_UP, number // 10), device, True
                    )
                row |= count_calls(trace(partial(paramstats.summarize, model), device))
            yield row


def _timed_calls(
    model: nn.Module, number: int, device: torch.device, busy: bool = False
) -> tuple[float, float]:
    """Return the median seconds until a call returned, and until its results were readable.

    If `busy`, the GPU still has 20 ms of other work when the call begins.
    """
    returned, complete = [], []
    for _ in range(number):
        timing.synchronize(device)
        if busy:
            torch.cuda._sleep(int(_BUSY_SECONDS * timing.CYCLES_PER_SECOND))
        begin = time.perf_counter()
        summary = paramstats.summarize(model)
        returned.append(time.perf_counter() - begin)
        summary.wait()
        complete.append(time.perf_counter() - begin)
    return statistics.median(returned), statistics.median(complete)


# ---- the profiler -------------------------------------------------------------------------------

_REGION = "paramstats: one call"

_KINDS = {
    "launches": re.compile("Launch"),
    "waits": re.compile("Synchronize|Memcpy(?!.*Async)|Memset(?!.*Async)|Free(?!Async)"),
    "allocations": re.compile("Malloc|HostAlloc|MemAlloc|MemCreate|HostRegister"),
}
"""Names of CUDA functions by what they do. Of the driver's, the profiler shows only launches."""

_GAP = 1e-3
"""Seconds before the region, which separate its GPU work from earlier work."""


def trace(call: Callable[[], paramstats.Summary], device: torch.device) -> list[dict[str, Any]]:
    """Return the profiler's events of one call, after another call as a warm-up."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    timing.synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        call().wait()
        timing.synchronize(device)
        time.sleep(_GAP)
        with torch.profiler.record_function(_REGION):
            summary = call()
        summary.wait()
        timing.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]  # type: ignore[no-any-return]


def count_calls(events: Sequence[dict[str, Any]], region: str = _REGION) -> dict[str, Any]:
    """Count the CUDA calls within a region, and add up the time of the GPU work from then on.

    The profiler does not show which call of the driver's interface has queued a copy.
    """
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
    work = [
        e
        for e in events
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        and float(e["ts"]) >= begin - _GAP / 2 * 1e6
    ]
    device_us: Counter[str] = Counter()
    for e in work:
        device_us[str(e["name"])] += e["dur"]
    names = [str(e["name"]) for e in calls]
    counts: dict[str, Any] = {
        kind: sum(map(bool, map(kinds.search, names))) for kind, kinds in _KINDS.items()
    }
    counts["copies"] = sum(e["cat"] == "gpu_memcpy" for e in work)
    return {**counts, "runtime_calls": dict(Counter(names)), "device_us": dict(device_us)}


# ---- command line -------------------------------------------------------------------------------

PARTS = {"smoke": smoke, "calls": calls}


def text(row: Row) -> str:
    """Return a row as one line."""
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
    )


def main() -> int:
    parser = argparse.ArgumentParser("python -m benches.on_gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"benches.on_gpu: torch {torch.__version__} finds no CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    timing.start_cuda()
    report: dict[str, Any] = {**hardware.describe("cuda"), "parts": {}}
    print(paramstats.backend(), report["hardware"], sep="\n", flush=True)
    failed = False
    for name in options.only:
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
