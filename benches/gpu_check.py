"""Builds, tests and measures paramstats on a machine with a GPU, in less than eight minutes.

    python -m benches.gpu_check [--out DIR] [--budget SECONDS]
    python -m benches.gpu_check --dry-run     on any machine, with a fake GPU
    python -m benches.gpu_check --list        print the steps

It builds in place and needs no network. The Python that runs it needs torch with CUDA, setuptools
77 or later, ninja, pybind11, pytest, pytest-benchmark, hypothesis, numpy, pandas, scikit-learn and
transformers. Every step has a time limit; if one fails, the next ones still run, unless they need
it. The exit status is 1 if a step failed. DIR (default: $OUT, or build/gpu-check) receives gpu-
check.json, gpu-check.log and the results of each step, as soon as the step ends. On any machine,

    python -m benches.report DIR/*.json

then writes benches/results and the table of docs/benchmarks.md.

A dry run needs a torch without CUDA. It runs the same steps with tests.fake_device and a thousandth
of the sizes. Its numbers measure nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benches.limited import ROOT, Outcome, Step, run
from tests import fake_device

_BUDGET = 430.0
"""Seconds for all steps."""

_CUDA_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")

_MARK = "[dry run] "
"""Begins each line that a dry run prints."""

_DRY_RUN_LIMITS = 3
"""Factor of all limits in a dry run, which may have two cores."""

_NATIVE = """
import torch, paramstats
paramstats.summarize({"x": torch.ones(3, device="cuda")})  # waits for NVRTC if there is no cubin
print(paramstats.backend())
assert paramstats.backend().cuda == "native", paramstats.backend().cuda_missing
"""
_PACKAGES = """
import importlib.util, pathlib, shutil, sys, sysconfig
needed = "torch ninja pybind11 setuptools pytest pytest_benchmark hypothesis numpy transformers"
missing = [name for name in needed.split() if not importlib.util.find_spec(name)]
missing += [] if shutil.which("g++") or shutil.which("clang++") else ["g++"]
missing += [] if pathlib.Path(sysconfig.get_path("include"), "Python.h").exists() else ["Python.h"]
print(sys.version, "missing:", *missing or ["nothing"])
sys.exit(bool({"torch", "ninja", "pybind11", "setuptools", "g++", "Python.h"} & {*missing}))
"""
_CAPABILITY = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"

_OTHER_TESTS = ("test_backend.py", "test_torch_abi.py", "test_images.py", "test_walk.py",
                "test_summary.py", "test_inputs.py", "modes")  # fmt: skip
"""Tests of what depends on the build of torch or the machine; a dry run has the first."""


class Tools:
    """Finds the programs of CUDA.

    Args:
        path: the folders of the variable PATH.
    """

    def __init__(self, path: str) -> None:
        home = os.environ.get("CUDA_HOME")
        folders = [f"{home}/bin", f"{home}/compute-sanitizer"] if home else []
        self._path = os.pathsep.join([path, *folders, *_CUDA_FOLDERS])

    def step(
        self, tool: str, *arguments: str, name: str = "", limit: float = 20, **options: Any
    ) -> Step:
        """Return a step that runs a program, or is skipped if the program is missing."""
        path = shutil.which(tool, path=self._path)
        missing = None if path else f"{tool} is not installed"
        return Step(name or tool, (path or tool, *arguments), limit, missing=missing, **options)

    def sanitizer(self, tool: str, limit: float, *options: str) -> Step:
        """Check only paramstats' kernels, and ignore API errors, which torch provokes on purpose.

        torch's caching allocator is switched off: it would hide accesses beyond a tensor.
        """
        arguments = (
            *("--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=paramstats"),
            *("--report-api-errors", "no", sys.executable, "-m", "benches.sanitizer_case"),
            *options,
        )
        return self.step(
            "compute-sanitizer",
            *arguments,
            name=tool,
            limit=limit,
            skip_if="Device not supported",
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )


def steps(out: Path, tools: Tools, dry_run: bool = False) -> list[Step]:
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
    others = [f"tests/{name}" for name in _OTHER_TESTS[: 1 if dry_run else None]]
    return [
        tools.step("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"),
        tools.step("nvcc", "--version"),
        Step("packages", (python, "-c", _PACKAGES), 30, essential=True),
        Step("build", (python, "setup.py", "build_ext", "--inplace"), 200,
             essential=True, environment={"PARAMSTATS_STRICT_BUILD": "1", "PARAMSTATS_NVRTC": ""}),
        Step("native backend", (python, "-c", _NATIVE), 40, essential=True,
             environment={"PARAMSTATS_BACKEND": "native"}),
        module("benches.on_gpu", "smoke", "--only", "smoke", limit=40),
        Step("CUDA tests", (*pytest, "-rs", "tests/test_cuda.py"), 120),
        benchmark("memory", "(GiB or MB) and not compiled", 60),
        module("benches.on_gpu", "on_gpu", "--only", "calls", limit=60),
        module("benches.kernel_images", "kernel_images", limit=60),
        tools.sanitizer("memcheck", 90),
        benchmark("models", "not GiB and not MB and not compiled", 90),
        module("benches.step_cost", "step_cost", "--device", "cuda", limit=60),
        Step("report", (python, "-m", "benches.report", "--dry-run", *measured), 20, lines=60),
        tools.sanitizer("racecheck", 60, "--small"),
        tools.sanitizer("initcheck", 60, "--small"),
        benchmark("compiled", "compiled", 120),
        Step("other tests", (*pytest, "-x", "-m", "not huge and not slow and not cuda", *others),
             150),
    ]  # fmt: skip


def _environment(found: dict[str, str]) -> dict[str, str]:
    """Return an environment that uses this tree and builds only for the GPU of this machine."""
    paths = (found.get("PYTHONPATH", ""), str(ROOT))
    found = {**found, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = (sys.executable, "-c", _CAPABILITY)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=found)
    if done.returncode == 0:
        found.setdefault("TORCH_CUDA_ARCH_LIST", done.stdout.strip())
    return found


def check(out: Path, budget: float, environment: Mapping[str, str], dry_run: bool) -> int:
    """Run all steps. Return the exit status."""
    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    for stale in (*out.glob("*.json"), *out.glob("*.log")):
        stale.unlink()
    mark = _MARK if dry_run else ""
    outcomes: list[Outcome] = []
    for step in steps(out, Tools(environment["PATH"]), dry_run):
        if dry_run:
            step = replace(step, limit=step.limit * _DRY_RUN_LIMITS)
        remaining = budget - (time.monotonic() - begin)
        outcomes.append(run(step, remaining, out / "gpu-check.log", environment, mark))
        report = {"dry_run": dry_run, "outcomes": [asdict(outcome) for outcome in outcomes]}
        (out / "gpu-check.json").write_text(json.dumps(report, indent=1) + "\n")
        if step.essential and outcomes[-1].result == "FAIL":
            print(f"{mark}== the later steps need {step.name}")
            break
    for outcome in outcomes:
        seconds = f"{outcome.seconds:6.1f} s"
        print(f"{mark}{outcome.name:<16} {outcome.result}  {seconds}  {outcome.reason}")
    print(f"{mark}{time.monotonic() - begin:.0f} s in all; results in {out}:")
    print(mark + " ".join(sorted(path.name for path in out.iterdir())))
    return 1 if any(outcome.result == "FAIL" for outcome in outcomes) else 0


def main() -> int:
    parser = argparse.ArgumentParser("python -m benches.gpu_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--budget", type=float, help=f"seconds, default {_BUDGET:.0f}")
    parser.add_argument("--dry-run", action="store_true", help="use a fake GPU")
    parser.add_argument("--list", action="store_true", help="print the commands and limits")
    options = parser.parse_args()
    dry_run: bool = options.dry_run
    default = ROOT / "build" / "gpu-check-dry-run"
    if not dry_run:
        default = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check")
    out = (options.out or default).resolve()
    if options.list:
        for step in steps(out, Tools(os.environ["PATH"])):
            missing = f" (skipped here: {step.missing})" if step.missing else ""
            print(f"{step.name}, at most {step.limit:.0f} s{missing}")
            print(f"    {' '.join(step.command).strip()}")
        return 0
    found = dict(os.environ)
    if dry_run:
        found |= fake_device.environment(fake_device.build())
    environment = _environment(found)
    print(f"GPU architecture: {environment.get('TORCH_CUDA_ARCH_LIST', 'unknown')}")
    budget = options.budget or _BUDGET * (_DRY_RUN_LIMITS if dry_run else 1)
    return check(out, budget, environment, dry_run)


if __name__ == "__main__":
    sys.exit(main())
