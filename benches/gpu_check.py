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

_SANITIZER_FAILED = "9"
_CUDA_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")

_NATIVE = (
    "import torch, paramstats; torch.cuda.init(); b = paramstats.backend(); print(b); "
    "assert b.cuda == 'native', b.cuda"
)
_PACKAGES = """
import importlib.metadata, importlib.util, pathlib, shutil, sys, sysconfig
def absent(names): return [name for name in names.split() if not importlib.util.find_spec(name)]
needed = absent("torch ninja pybind11 setuptools")
if not needed and int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
    needed.append("setuptools>=77")
if not shutil.which("g++") and not shutil.which("clang++"):
    needed.append("g++")
if not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists():
    needed.append("Python.h")
tests = absent("pytest pytest_benchmark hypothesis numpy pandas sklearn transformers")
print("missing to build:", *needed or ["nothing"])
print("missing to test and measure:", *tests or ["nothing"])
sys.exit(bool(needed))
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

    measured = [str(out / f"{name}.json") for name in ("memory", "models", "on_gpu", "step_cost",
                                                        "compiled")]  # fmt: skip
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
        module("benches.on_gpu", "on_gpu", limit=60),
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
    path = find_tool(tool)
    missing = None if path else f"{tool} is not installed"
    return Step(tool, (path or tool, *arguments), 20, missing=missing)


def _sanitizer(tool: str, limit: float) -> Step:
    path = find_tool("compute-sanitizer")
    return Step(
        tool,
        (path or "compute-sanitizer", "--tool", tool, "--error-exitcode", _SANITIZER_FAILED,
         *sanitizer_options(_output_of(path, "--help") if path else ""),
         sys.executable, "-m", "benches.sanitizer_case"),
        limit,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        missing=None if path else "compute-sanitizer is not installed",
        skip_if="Device not supported",
    )  # fmt: skip


def sanitizer_options(help_text: str) -> tuple[str, ...]:
    """Select only paramstats' kernels and ignore API errors, which torch provokes on purpose.

    The names of the options depend on the version.
    """
    options: list[str] = []
    for option in ("--kernel-name", "--kernel-regex", "--filter"):
        if option in help_text:
            options += [option, "kns=paramstats"]
            break
    if "--report-api-errors" in help_text:
        options += ["--report-api-errors", "no"]
    return tuple(options)


def find_tool(name: str) -> str | None:
    """Find a program on the PATH, in CUDA_HOME, or where CUDA is usually installed."""
    home = os.environ.get("CUDA_HOME")
    folders = [*([f"{home}/bin", f"{home}/compute-sanitizer"] if home else []), *_CUDA_FOLDERS]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def _output_of(*command: str) -> str:
    """Return the output of a command, or an empty string if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _environment() -> dict[str, str]:
    """Return an environment that uses this tree and builds only for the GPU of this machine."""
    found = {**os.environ, "PYTHONUNBUFFERED": "1"}
    paths = (str(ROOT), os.environ.get("PYTHONPATH", ""))
    found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    capability = _output_of(sys.executable, "-c", _CAPABILITY)
    if capability:
        found.setdefault("TORCH_CUDA_ARCH_LIST", capability)
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
