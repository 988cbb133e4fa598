"""Builds, tests and measures paramstats on a machine with a GPU, in less than eight minutes.

    python -m benches.gpu_check [--out DIR] [--budget SECONDS] [--dry-run]

It builds in place and needs no network. The Python that runs it needs torch with CUDA, setuptools
77 or later, ninja, pybind11, pytest, pytest-benchmark, hypothesis, numpy, pandas, scikit-learn and
transformers. Every step has a time limit; if one fails, the next ones still run. The exit status is
1 if a step failed. DIR (default: $OUT, or build/gpu-check) receives gpu-check.json, gpu-check.log
and the results of each step. On any machine,

    python -m benches.report DIR/*.json

then writes benches/results and the table of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benches.limited import ROOT, Outcome, Step, run

_BUDGET = 430.0
"""Seconds for all steps."""

_CUDA_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")

_NATIVE = (
    "import torch, paramstats; torch.cuda.init(); b = paramstats.backend(); print(b); "
    "assert b.cuda == 'native', b.cuda"
)
_PACKAGES = """
import importlib.util, pathlib, shutil, sys, sysconfig
needed = "torch ninja pybind11 setuptools pytest pytest_benchmark hypothesis numpy transformers"
missing = [name for name in needed.split() if not importlib.util.find_spec(name)]
missing += [] if shutil.which("g++") or shutil.which("clang++") else ["g++"]
missing += [] if pathlib.Path(sysconfig.get_path("include"), "Python.h").exists() else ["Python.h"]
print("missing:", *missing or ["nothing"])
sys.exit(bool({"torch", "ninja", "pybind11", "setuptools", "g++", "Python.h"} & {*missing}))
"""
_CAPABILITY = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"

_NO_GPU_TESTS = ("checkpoints", "history", "integrations", "test_docs.py", "test_findings.py")
"""Tests of code that does not depend on the device."""


def steps(out: Path) -> list[Step]:
    """Return the steps, the most important ones first."""
    python = sys.executable
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")

    def benchmark(name: str, selected: str, limit: float) -> Step:
        command = (*pytest, "benches/test_models.py", "--device", "cuda", "-k", selected)
        return Step(name, (*command, f"--benchmark-json={out / name}.json"), limit)

    def module(name: str, json_name: str, *options: str, limit: float) -> Step:
        path = str(out / f"{json_name}.json")
        return Step(json_name, (python, "-m", name, "--json", path, *options), limit, lines=60)

    measured = [str(out / f"{name}.json") for name in ("memory", "models", "on_gpu", "step_cost")]
    ignored = [f"--ignore=tests/{name}" for name in _NO_GPU_TESTS]
    return [
        _tool_step("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"),
        _tool_step("nvcc", "--version"),
        Step("packages", (python, "-c", _PACKAGES), 30, essential=True),
        Step("build", (python, "setup.py", "build_ext", "--inplace"), 200, essential=True,
             environment={"PARAMSTATS_STRICT_BUILD": "1"}),
        Step("native backend", (python, "-c", _NATIVE), 40, essential=True),
        module("benches.on_gpu", "smoke", "--only", "smoke", limit=40),
        Step("CUDA tests", (*pytest, "tests/test_cuda.py"), 120),
        benchmark("memory", "(GiB or MB) and not compiled", 60),
        module("benches.on_gpu", "on_gpu", "--only", "calls", limit=60),
        _sanitizer("memcheck", 90),
        benchmark("models", "not GiB and not MB and not compiled", 90),
        module("benches.step_cost", "step_cost", "--device", "cuda", limit=60),
        Step("report", (python, "-m", "benches.report", "--dry-run", *measured), 20, lines=60),
        _sanitizer("racecheck", 60),
        _sanitizer("initcheck", 60),
        benchmark("compiled", "compiled", 120),
        Step("other tests", (*pytest, "-x", "-m", "not huge and not slow and not cuda", *ignored,
             "tests"), 150),
    ]  # fmt: skip


def _tool_step(tool: str, *arguments: str) -> Step:
    path = _find_tool(tool)
    missing = None if path else f"{tool} is not installed"
    return Step(tool, (path or tool, *arguments), 20, missing=missing)


def _sanitizer(tool: str, limit: float) -> Step:
    """Check only paramstats' kernels, and ignore API errors, which torch provokes on purpose."""
    path = _find_tool("compute-sanitizer")
    return Step(
        tool,
        (path or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9",
         "--kernel-name", "kns=paramstats", "--report-api-errors", "no",
         sys.executable, "-m", "benches.sanitizer_case"),
        limit,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        missing=None if path else "compute-sanitizer is not installed",
        skip_if="Device not supported",
    )  # fmt: skip


def _find_tool(name: str) -> str | None:
    """Find a program on the PATH, in CUDA_HOME, or where CUDA is usually installed."""
    home = os.environ.get("CUDA_HOME")
    folders = [*([f"{home}/bin", f"{home}/compute-sanitizer"] if home else []), *_CUDA_FOLDERS]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def _environment() -> dict[str, str]:
    """Return an environment that uses this tree and builds only for the GPU of this machine."""
    found = {**os.environ, "PYTHONUNBUFFERED": "1"}
    paths = (str(ROOT), os.environ.get("PYTHONPATH", ""))
    found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = (sys.executable, "-c", _CAPABILITY)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found.setdefault("TORCH_CUDA_ARCH_LIST", done.stdout.strip())
    return found


def main() -> int:
    parser = argparse.ArgumentParser("python -m benches.gpu_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    default = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check")
    parser.add_argument("--out", type=Path, default=default, help="folder for the results")
    parser.add_argument(
        "--budget", type=float, default=_BUDGET, help="seconds, default %(default)s"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and limits")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    if options.dry_run:
        for step in steps(out):
            print(f"{step.name}, at most {step.limit:.0f} s: {step.missing or ''}")
            print(f"    {' '.join(step.command).strip()}")
        return 0
    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    for stale in (*out.glob("*.json"), *out.glob("*.log")):
        stale.unlink()
    environment = _environment()
    print(f"GPU architecture: {environment.get('TORCH_CUDA_ARCH_LIST', 'unknown')}")
    outcomes: list[Outcome] = []
    for step in steps(out):
        remaining = options.budget - (time.monotonic() - begin)
        outcomes.append(run(step, remaining, out / "gpu-check.log", environment))
        report = {"outcomes": [asdict(outcome) for outcome in outcomes]}
        (out / "gpu-check.json").write_text(json.dumps(report, indent=1) + "\n")
        if step.essential and outcomes[-1].result == "FAIL":
            print(f"== the later steps need {step.name}")
            break
    for outcome in outcomes:
        print(f"{outcome.name:<16} {outcome.result}  {outcome.seconds:6.1f} s  {outcome.reason}")
    print(out)
    return 1 if any(outcome.result == "FAIL" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
