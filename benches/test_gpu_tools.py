"""What only a GPU's machine will run, as far as any machine can try it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benches import compiling, sanitizer_case, test_device_memory
from benches.exact import exact, worst_errors
from benches.gpu_check.running import Outcome, Step, run
from benches.gpu_check.steps import BUDGET, sanitizer_options
from benches.on_gpu import launches, training
from benches.on_gpu.__main__ import PARTS
from benches.on_gpu.small_tensors import small_tensors

CPU = torch.device("cpu")


def _event(cat: str, name: str, ts: float, correlation: int = 0) -> dict[str, Any]:
    return {"cat": cat, "name": name, "ts": ts, "dur": 1, "args": {"correlation": correlation}}


def test_calls_are_counted_within_the_region() -> None:
    events = [
        {"cat": "user_annotation", "name": "R", "ts": 10.0, "dur": 10.0},
        {"cat": "gpu_user_annotation", "name": "R", "ts": 30.0, "dur": 10.0},
        _event("cuda_runtime", "cudaLaunchKernel", 9.0, 1),
        _event("cuda_runtime", "cudaLaunchKernel", 11.0, 2),
        _event("cuda_driver", "cuLaunchKernelEx", 12.0, 3),
        _event("cuda_runtime", "cudaLaunchKernelExC_v11060", 13.0, 4),
        _event("cuda_runtime", "cudaMemcpyAsync", 14.0, 5),
        _event("cuda_runtime", "cudaHostAlloc", 15.0, 6),
        _event("cuda_runtime", "cudaEventRecord", 16.0, 7),
        _event("cuda_runtime", "cudaStreamSynchronize", 17.0, 8),
        _event("cuda_runtime", "cudaDeviceSynchronize", 21.0, 9),
        _event("kernel", "before", 40.0, 1),
        _event("kernel", "mine", 41.0, 2),
        _event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 42.0, 5),
    ]
    counts = launches.count_calls(events, "R")
    kinds = ("launches", "copies", "waits", "allocations", "pageable_copies")
    assert [counts[kind] for kind in kinds] == [3, 1, 1, 1, 1]
    assert counts["device_work"] == {"mine": 1, "Memcpy HtoD (Pageable -> Device)": 1}


def test_the_profiler_gives_the_region() -> None:
    found = launches.launches(small_tensors(2, True, CPU), "case", "reference", CPU)
    assert (found.tensors, found.launches, found.waits) == (8, 0, 0)


def test_training_steps() -> None:
    pytest.importorskip("transformers")
    cost = training.training_cost(training.TINY, "reference", 1, CPU)
    assert len(cost["steps"]) == 4
    assert all(step["median_s"] > 0 for step in cost["steps"].values())
    assert len(list(training.lines(cost))) == 4


@pytest.mark.parametrize("name", sorted(set(PARTS) - {"training"}))
def test_parts_tell_what_they_measured(name: str) -> None:
    found = PARTS[name].measure(CPU, True)
    told = [line for row in found for line in PARTS[name].lines(row)]
    assert len(told) == len(found) > 0
    assert all(row["backend"] in line for row, line in zip(found, told, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_one_tensor_on_any_device(dtype: torch.dtype) -> None:
    """That the contestants of a GPU's memory are right, but for the compiler and the backend."""
    tensor = test_device_memory.filled(100_000, dtype, CPU)
    expected = {"x": exact(tensor)}
    for contestant in test_device_memory.CONTESTANTS:
        without = contestant.name == "foreach_norm_only" and dtype.itemsize == 1
        if not (contestant.compiles or without):
            statistics = contestant.statistics(contestant.run(tensor))
            worst_errors({"x": statistics}, expected, contestant.tolerances)


def test_sanitizer_case() -> None:
    assert sanitizer_case.check(CPU) == []


def test_a_compiler_that_takes_too_long_is_stopped() -> None:
    begin = time.perf_counter()
    assert "more than 0 s" in str(compiling.why_not_compiled(lambda: time.sleep(5), 0.1))
    assert time.perf_counter() - begin < 4
    assert "ZeroDivisionError" in str(compiling.why_not_compiled(lambda: 1 // 0, 1))
    assert compiling.why_not_compiled(lambda: None, 1) is None


def _run(tmp_path: Path, code: str, limit: float = 20, **more: Any) -> Outcome:
    step = Step("step", (sys.executable, "-c", code), limit, **more)
    return run(step, BUDGET, tmp_path / "log", os.environ)


def test_steps_end_as_they_end(tmp_path: Path) -> None:
    assert _run(tmp_path, "print('well')").result == "pass"
    assert _run(tmp_path, "raise SystemExit(9)").reason == "exit status 9"
    assert _run(tmp_path, "exit('not supported')", excuse="not supported").result == "skip"
    assert _run(tmp_path, "", needs=tmp_path / "nothing").result == "skip"
    assert _run(tmp_path, "", limit=1).result == "skip"
    assert _run(tmp_path, "", impossible="no tool").reason == "no tool"
    assert "well" in (tmp_path / "log").read_text()


def test_a_step_is_interrupted_then_killed(tmp_path: Path) -> None:
    wait = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('wrote it')"
    stopped = _run(tmp_path, wait, limit=6)
    assert stopped.result == "FAIL" and stopped.reason.startswith("stopped")
    assert "wrote it" in (tmp_path / "log").read_text()
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    assert _run(tmp_path, deaf, limit=6).seconds < 10


def test_sanitizer_options_are_those_it_has() -> None:
    assert sanitizer_options("") == ()
    options = sanitizer_options("  --kernel-name arg\n  --kernel-regex arg")
    assert options == ("--kernel-name", "kns=paramstats")
