"""What is run on a GPU's machine, in its order."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benches.gpu_check.running import ROOT, Step

BUDGET = 560.0
"""Seconds for all steps: what ends at ten minutes on such a machine is killed with its results."""

_SANITIZER_FAILED = 9
_CUDA_TOOLS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")

_NATIVE = (
    "import torch, paramstats; torch.cuda.init(); b = paramstats.backend(); print(b); "
    "assert b.cuda == 'native', b.cuda"
)
_TOOLS = """
import importlib.util as util, importlib.metadata as metadata, sys
build, run = "torch ninja pybind11", "pytest pytest_benchmark hypothesis numpy pandas sklearn"
names = f"{build} {run} transformers".split()
missing = [name for name in names if util.find_spec(name) is None]
version = metadata.version("setuptools") if util.find_spec("setuptools") else "0"
if int(version.split(".")[0]) < 77:
    missing.append(f"setuptools>=77 (here {version})")
print("missing: " + ", ".join(missing) if missing else "all there")
sys.exit(any("setuptools" in name or name in ("torch", "ninja", "pybind11") for name in missing))
"""
_CAPABILITY = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"


def steps(out: Path, quick: bool) -> list[Step]:
    """In their order; what comes first is what the rest is worth nothing without."""
    python = sys.executable
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    on_gpu, benchmark = out / "on-gpu.json", out / "benchmark.json"
    few = ("-m", "not large", "-k", "mlp or 32_MB") if quick else ()
    memcheck, *more_checks = (_sanitizer(tool) for tool in _sanitizers(quick))
    return [
        _tool_step("driver", "nvidia-smi", "--query-gpu=name,driver_version,memory.total",
                   "--format=csv"),
        _tool_step("compiler", "nvcc", "--version"),
        Step("packages", (python, "-c", _TOOLS), 30, essential=True),
        Step("build", (python, "setup.py", "build_ext", "--inplace"), 200, essential=True,
             environment={"PARAMSTATS_STRICT_BUILD": "1"}),
        Step("native backend", (python, "-c", _NATIVE), 40, essential=True),
        Step("CUDA tests", (*pytest, "-m", "cuda", "tests"), 120),
        memcheck,
        Step("on_gpu", (python, "-m", "benches.on_gpu", "--json", str(on_gpu))
             + (("--quick",) if quick else ()), 120),
        Step("benchmarks", (*pytest, "benches", "--device", "cuda", "--compile-seconds", "30",
             "--ignore", "benches/test_gpu_tools.py", *few,
             f"--benchmark-json={benchmark}"), BUDGET, reserve=20),
        Step("report", (python, "-m", "benches.report", "--json", str(benchmark),
             "--on-gpu", str(on_gpu), "--dry-run"), 20, needs=benchmark),
        *more_checks,
        Step("other tests", (*pytest, "-x", "-m", "not huge and not slow and not cuda", *_NO_GPU,
             "tests"), 150),
    ]  # fmt: skip


_NO_GPU = tuple(
    f"--ignore=tests/{room}"
    for room in ("checkpoints", "history", "integrations", "test_docs.py", "test_findings.py")
)
"""Tests of what stands on a summary, wherever its statistics were made."""


def _sanitizers(quick: bool) -> tuple[str, ...]:
    return ("memcheck",) if quick else ("memcheck", "racecheck", "initcheck")


def _tool_step(name: str, tool: str, *arguments: str) -> Step:
    path = find_tool(tool)
    impossible = None if path else f"{tool} is not here"
    return Step(name, (path or tool, *arguments), 20, impossible=impossible)


def _sanitizer(tool: str) -> Step:
    path = find_tool("compute-sanitizer")
    return Step(
        tool,
        (path or "compute-sanitizer", "--tool", tool, "--error-exitcode", str(_SANITIZER_FAILED),
         *sanitizer_options(_help(path) if path else ""),
         sys.executable, "-m", "benches.sanitizer_case"),
        120,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        impossible=None if path else "compute-sanitizer is not here",
        excuse="Device not supported",
    )  # fmt: skip


def sanitizer_options(described: str) -> tuple[str, ...]:
    """Only paramstats' kernels, and no errors of API calls, some of which torch provokes: as far
    as this version's --help names such options."""
    options: list[str] = []
    for option in ("--kernel-name", "--kernel-regex", "--filter"):
        if option in described:
            options += [option, "kns=paramstats"]
            break
    if "--report-api-errors" in described:
        options += ["--report-api-errors", "no"]
    return tuple(options)


def _help(path: str) -> str:
    try:
        done = subprocess.run(
            [path, "--help"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def find_tool(name: str) -> str | None:
    """On the path, in CUDA_HOME, or where CUDA is usually installed."""
    home = os.environ.get("CUDA_HOME")
    folders = [*([f"{home}/bin", f"{home}/compute-sanitizer"] if home else []), *_CUDA_TOOLS]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def environment() -> dict[str, str]:
    """This one's, with these sources, and the kernels built for the GPU that is here."""
    found = {**os.environ, "PYTHONUNBUFFERED": "1"}
    paths = (str(ROOT), os.environ.get("PYTHONPATH", ""))
    found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if "TORCH_CUDA_ARCH_LIST" not in found:
        capability = _output_of((sys.executable, "-c", _CAPABILITY))
        if capability:
            found["TORCH_CUDA_ARCH_LIST"] = capability
    return found


def _output_of(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
