"""What a call costs on a GPU beside its reading: the host's time, launches, waits, training steps.

    python -m benches.on_gpu --json out.json
    python -m benches.on_gpu --quick             fewer turns, for a look

Exits 2 where there is no CUDA device. The functions take any device, so that they can be tried.
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import paramstats
from benches import hardware, models
from benches.contestants import item_loop_no_grad

MUST = 150e-6
AIM = 60e-6
"""Seconds of the host for a call over 1,000 small tensors."""

_REGION = "paramstats: one call"
_WARM_UP = 5
_FEW_CALLS = 10
"""Of the reference engine, which launches some thirty kernels for each tensor."""

_BUSY_SECONDS = 0.02
_CYCLES = 2e9
"""In a second; faster than GPUs' clocks, so that they are busy for no less than was asked."""


@contextmanager
def engine_of(name: str) -> Iterator[None]:
    """Has paramstats run on an engine."""
    before = paramstats.engine._engine
    paramstats.engine._engine = paramstats.engine.choose(name)
    try:
        yield
    finally:
        paramstats.engine._engine = before


def engines(device: torch.device) -> tuple[str, ...]:
    """The native one first, where it serves this device."""
    backend = paramstats.backend()
    here = backend.cuda if device.type == "cuda" else backend.cpu
    return ("native", "reference") if here == "native" else ("reference",)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def small_tensors(layers: int, gradients: bool, device: torch.device) -> nn.Module:
    """Two parameters a layer, of 256 and 16 elements."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers))).to(device)
    if gradients:
        for p in model.parameters():
            p.grad = torch.randn_like(p)
    return model


# ---- the host's time ----------------------------------------------------------------------------


@dataclass(frozen=True)
class HostTime:
    """Seconds until a call returns, and until its figures are here."""

    case: str
    engine: str
    tensors: int
    calls: int
    median_s: float
    tenth_s: float
    ninetieth_s: float
    busy_s: float | None
    """The median while the device has 20 ms of other work to do first; None on a CPU."""
    complete_s: float
    """The median until the figures could be read."""
    must_s: float | None
    aim_s: float | None


def host_time(
    model: nn.Module, case: str, engine: str, calls: int, device: torch.device, targets: bool
) -> HostTime:
    """Nothing is waited for while the clock runs; the queue is empty when it starts."""
    with engine_of(engine):
        for _ in range(_WARM_UP):
            paramstats.summarize(model).wait()
        returned, complete = _timed_calls(model, calls, device, lambda: None)
        busy = None
        if device.type == "cuda":
            few = max(_WARM_UP, calls // 10)
            busy = statistics.median(_timed_calls(model, few, device, _keep_busy)[0])
        deciles = statistics.quantiles(returned, n=10)
    return HostTime(
        case=case,
        engine=engine,
        tensors=len(models.tensors(model)),
        calls=calls,
        median_s=statistics.median(returned),
        tenth_s=deciles[0],
        ninetieth_s=deciles[-1],
        busy_s=busy,
        complete_s=statistics.median(complete),
        must_s=MUST if targets else None,
        aim_s=AIM if targets else None,
    )


def _timed_calls(
    model: nn.Module, calls: int, device: torch.device, before: Callable[[], None]
) -> tuple[list[float], list[float]]:
    returned, complete = [], []
    for _ in range(calls):
        synchronize(device)
        before()
        begin = time.perf_counter()
        summary = paramstats.summarize(model)
        returned.append(time.perf_counter() - begin)
        summary.wait()
        complete.append(time.perf_counter() - begin)
    return returned, complete


def _keep_busy() -> None:
    torch.cuda._sleep(int(_BUSY_SECONDS * _CYCLES))


# ---- launches and waits -------------------------------------------------------------------------

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
    engine: str
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


def launches(model: nn.Module, case: str, engine: str, device: torch.device) -> Launches:
    with engine_of(engine):
        for _ in range(_WARM_UP):
            paramstats.summarize(model).wait()
        counts = count_calls(trace(lambda: paramstats.summarize(model), device), _REGION)
        refused = refused_by_torch(lambda: paramstats.summarize(model), device)
    return Launches(case, engine, len(models.tensors(model)), **counts, refused_by_torch=refused)


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


# ---- the cost in training -----------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """A GPT-2 of some size, and batches for it."""

    title: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    tokens: int


GPT2 = Training("GPT-2, 124 M parameters, bf16 autocast, AdamW", 12, 768, 12, 50_257, 16, 512)
TINY = Training("GPT-2 of two small layers", 2, 64, 2, 256, 2, 32)

_BLOCK = 10
"""Steps between two looks of a variant that looks now and then; what is timed at once."""


class Steps:
    """Real training steps on random tokens, with a place to look in after each backward pass."""

    def __init__(self, training: Training, device: torch.device) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=training.layers,
            n_embd=training.width,
            n_head=training.heads,
            vocab_size=training.vocabulary,
            n_positions=training.tokens,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.device = device
        model: Any = GPT2LMHeadModel(config)
        self.model: nn.Module = model.to(device)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, fused=device.type == "cuda"
        )
        shape = (training.batch, training.tokens)
        self._ids = torch.randint(training.vocabulary, shape, device=device)

    def block(self, look: Callable[[nn.Module, int], None], end: Callable[[], None]) -> float:
        """Seconds of `_BLOCK` steps, from an empty queue to an empty queue."""
        synchronize(self.device)
        begin = time.perf_counter()
        for step in range(_BLOCK):
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.model(input_ids=self._ids, labels=self._ids, use_cache=False).loss
            loss.backward()
            look(self.model, step)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        end()
        synchronize(self.device)
        return time.perf_counter() - begin


class Deferred:
    """Summarises every so many steps, and reads the figures a step later."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._last: paramstats.Summary | None = None

    def __call__(self, model: nn.Module, step: int) -> None:
        new = paramstats.summarize(model) if step % self._every == 0 else None
        self.read()
        self._last = new

    def read(self) -> None:
        if self._last is not None:
            self._last.scalars()
        self._last = None


def _looks() -> dict[str, tuple[Callable[[nn.Module, int], None], Callable[[], None]]]:
    """What happens after the backward pass of each step, and at the end of a block."""

    def loop(model: nn.Module, step: int) -> None:
        if step == 0:
            item_loop_no_grad(model)

    now_and_then, always = Deferred(_BLOCK), Deferred(1)
    return {
        "nothing": (lambda model, step: None, lambda: None),
        "summary every 10 steps": (now_and_then, now_and_then.read),
        "summary every step, read a step later": (always, always.read),
        ".item() loop every 10 steps": (loop, lambda: None),
    }


def training_cost(
    training: Training, engine: str, turns: int, device: torch.device
) -> dict[str, Any]:
    """Milliseconds a step of each variant, and how much more than of none, in turns.

    The ratio is taken within each turn, whose first variant is another one every time.
    """
    steps = Steps(training, device)
    looks = _looks()
    seconds: dict[str, list[float]] = {name: [] for name in looks}
    with engine_of(engine):
        for look, end in looks.values():
            steps.block(look, end)
        for turn in range(turns):
            names = list(looks)
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(steps.block(*looks[name]) / _BLOCK)
    base = seconds["nothing"]
    return {
        "title": training.title,
        "engine": engine,
        "tokens_a_step": training.batch * training.tokens,
        "turns": turns,
        "steps": {
            name: {
                "median_s": statistics.median(times),
                "more": statistics.median(t / b - 1 for t, b in zip(times, base, strict=True)),
                "all_s": times,
            }
            for name, times in seconds.items()
        },
    }


# ---- the same on every run ----------------------------------------------------------------------


def repeatable(source: Any, case: str, engine: str, runs: int) -> dict[str, Any]:
    """How many runs give the first one's bits: summaries compare by the bytes of their states."""
    with engine_of(engine):
        first = paramstats.summarize(source)
        same = 1 + sum(paramstats.summarize(source) == first for _ in range(runs - 1))
    return {"case": case, "engine": engine, "runs": runs, "same": same}


def with_nan(numel: int, device: torch.device) -> torch.Tensor:
    torch.manual_seed(0)
    tensor = torch.randn(numel, device=device)
    tensor[numel // 3] = float("nan")
    tensor[numel // 2] = float("inf")
    return tensor


# ---- all of it ----------------------------------------------------------------------------------

Parts = dict[str, Callable[[], Any]]


def parts(device: torch.device, quick: bool) -> Parts:
    """What is measured, by the name that the report knows it under."""
    calls = 100 if quick else 1000
    turns = 3 if quick else 9
    small = (
        ("1,000 parameters, no gradients", 500, False, True),
        ("500 parameters and their gradients", 250, True, True),
        ("1,000 parameters and their gradients", 500, True, False),
    )

    def of_host() -> list[dict[str, Any]]:
        found = []
        for engine in engines(device):
            native = engine == "native"
            for case, layers, gradients, targets in small:
                model = small_tensors(layers, gradients, device)
                some = calls if native else _FEW_CALLS
                found.append(
                    asdict(host_time(model, case, engine, some, device, targets and native))
                )
        return found

    def of_launches() -> list[dict[str, Any]]:
        found = []
        for engine in engines(device):
            for case, layers, gradients, _ in small if engine == "native" else small[:1]:
                model = small_tensors(layers, gradients, device)
                found.append(asdict(launches(model, case, engine, device)))
        return found

    def of_training() -> list[dict[str, Any]]:
        training = GPT2 if device.type == "cuda" else TINY
        return [training_cost(training, engines(device)[0], turns, device)]

    def of_repeats() -> list[dict[str, Any]]:
        large = 1 << (28 if device.type == "cuda" else 20)
        sources = {
            "1,000 parameters and their gradients": small_tensors(500, True, device),
            f"{large:,} elements with a NaN": {"x": with_nan(large, device)},
            f"{large:,} elements of bfloat16": {
                "x": torch.randn(large, device=device).to(torch.bfloat16)
            },
        }
        return [
            repeatable(source, case, engine, 10)
            for engine in engines(device)
            for case, source in sources.items()
        ]

    return {
        "host_time": of_host,
        "launches": of_launches,
        "repeatable": of_repeats,
        "training": of_training,
    }


def lines(name: str, found: Any) -> Iterator[str]:
    """A part as a few lines of text."""
    if isinstance(found, dict):
        yield f"{name}: FAILED, {found['error']}"
        return
    for row in found:
        if name == "host_time":
            busy = "" if row["busy_s"] is None else f", {row['busy_s'] * 1e6:.1f} us while busy"
            targets = (
                f"; must {row['must_s'] * 1e6:.0f} us, aim {row['aim_s'] * 1e6:.0f} us"
                if row["must_s"]
                else ""
            )
            yield (
                f"host time, {row['engine']}, {row['case']}: {row['median_s'] * 1e6:.1f} us"
                f"{busy}, complete after {row['complete_s'] * 1e6:.1f} us{targets}"
            )
        elif name == "launches":
            refused = row["refused_by_torch"] or "none"
            yield (
                f"one call, {row['engine']}, {row['case']}: {row['launches']} launches, "
                f"{row['copies']} copies ({row['pageable_copies']} pageable), {row['waits']} waits,"
                f" {row['allocations']} allocations; waits that torch refused: {refused}"
            )
        elif name == "training":
            for look, step in row["steps"].items():
                yield (
                    f"a step of {row['title']}, {row['engine']}, {look}: "
                    f"{step['median_s'] * 1e3:.2f} ms, {step['more']:+.2%}"
                )
        else:
            yield f"{row['engine']}, {row['case']}: {row['same']} of {row['runs']} runs the same"


def main() -> int:
    parser = argparse.ArgumentParser("python -m benches.on_gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument("--quick", action="store_true", help="fewer calls and turns")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"benches.on_gpu: torch {torch.__version__} finds no CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    torch.cuda.init()  # before paramstats is asked what it can do there
    print(paramstats.backend(), hardware.describe("cuda")["hardware"], sep="\n", flush=True)
    report: dict[str, Any] = {**hardware.describe("cuda"), "quick": options.quick, "parts": {}}
    failed = False
    for name, measure in parts(device, options.quick).items():
        try:
            found = measure()
        except Exception as error:  # the other parts are still worth having
            found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            failed = True
        report["parts"][name] = found
        print(*lines(name, found), sep="\n", flush=True)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
