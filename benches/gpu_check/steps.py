"""Builds, tests, checks and measures on a machine with a GPU, in one command of under ten minutes.

    python -m benches.gpu_check [--out DIR] [--quick] [--dry-run]

Needs no network, and in the Python that runs it torch with CUDA, setuptools 77 or later, ninja,
pybind11, pytest, pytest-benchmark, hypothesis, numpy, pandas, scikit-learn and transformers. Every
step has a limit of its own and none stops the next one; at the end stands a
table of them, and the exit status is 1 where one failed. DIR (default: $OUT, else build/gpu-check)
gets gpu-check.json and gpu-check.log, on-gpu.json, and benchmark.json, from which

    python -m benches.report --json DIR/benchmark.json --on-gpu DIR/on-gpu.json

writes benches/results and the README's tables, on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

_ROOT = Path(__file__).parent.parent
BUDGET = 560.0
"""Seconds for all steps: what ends at ten minutes on such a machine is killed with its results."""

_GRACE = 10.0
"""Seconds of a step's limit that it is given to end by itself, and to write what it has."""

_LEAST = 5.0
"""Seconds below which a step is not begun."""

_TAIL = 8
_TAIL_OF_FAILURE = 40
_WIDTH = 200
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

Result = Literal["pass", "FAIL", "skip"]


@dataclass(frozen=True)
class Step:
    """A command with a limit."""

    name: str
    command: tuple[str, ...]
    limit: float
    """Seconds."""
    reserve: float = 0.0
    """Seconds that it leaves to the steps after it."""
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: Path | None = None
    """A file of an earlier step."""
    impossible: str | None = None
    """Why it cannot be tried here."""
    essential: bool = False
    """Whether nothing after it is worth its time where it fails."""
    excuse: str | None = None
    """Words in its output by which the machine, not paramstats, is to blame."""


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    name: str
    result: Result
    seconds: float
    reason: str
    command: str


# ---- the steps ----------------------------------------------------------------------------------


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
        Step("native engine", (python, "-c", _NATIVE), 40, essential=True),
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
"""Tests of what stands on a summary, wherever its figures were made."""


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
    paths = (str(_ROOT), os.environ.get("PYTHONPATH", ""))
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


# ---- running them -------------------------------------------------------------------------------


def limit_of(step: Step, left: float) -> float:
    """Its own, or what is left of the budget."""
    return min(step.limit, left - step.reserve)


def run(step: Step, left: float, log: Path, environment: Mapping[str, str]) -> Outcome:
    """Runs a step within its limit; its output goes to the log, and the end of it is shown."""
    command = " ".join(step.command).strip()
    limit = limit_of(step, left)
    why_not = step.impossible
    if why_not is None and limit < _LEAST:
        why_not = f"{max(left, 0):.0f} s left"
    if why_not is None and step.needs is not None and not step.needs.exists():
        why_not = f"{step.needs.name} was not written"
    if why_not is not None:
        print(f"== {step.name}: skip, {why_not}", flush=True)
        return Outcome(step.name, "skip", 0.0, why_not, command)

    print(f"== {step.name} (at most {limit:.0f} s)", flush=True)
    begin = time.monotonic()
    with log.open("ab") as output:
        output.write(f"\n== {step.name}: {command}\n".encode())
        output.flush()
        start = output.tell()
        try:
            process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=_ROOT,
                env={**environment, **step.environment},
                preexec_fn=os.setpgrp,  # no session: it is to end with whoever ends this one
            )
        except OSError as error:
            return Outcome(step.name, "FAIL", 0.0, str(error), command)
        in_time = _wait(process, limit)
    with log.open("rb") as written:
        written.seek(start)
        text = written.read().decode(errors="replace")
    seconds = time.monotonic() - begin
    result: Result = "pass" if in_time and process.returncode == 0 else "FAIL"
    reason = "" if result == "pass" else f"exit status {process.returncode}"
    if not in_time:
        reason = f"stopped after {seconds:.0f} s"
    if result == "FAIL" and step.excuse and step.excuse in text:
        result, reason = "skip", step.excuse
    for line in text.splitlines()[-(_TAIL_OF_FAILURE if result == "FAIL" else _TAIL) :]:
        print(line[:_WIDTH])
    print(f"== {step.name}: {result} {reason} after {seconds:.0f} s", flush=True)
    return Outcome(step.name, result, seconds, reason, command)


def _wait(process: subprocess.Popen[bytes], limit: float) -> bool:
    """Whether it ended in time. One that did not is interrupted, as by Ctrl-C, upon which pytest
    writes what it has measured; then it is killed. It and its children are a group of their own."""
    grace = min(_GRACE, limit / 4)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(limit - grace)
            return True
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        return False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it, and what it may have left behind
        process.wait()


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each step."""
    width = max(len(o.name) for o in outcomes)
    return "\n".join(
        f"{o.name:<{width}}  {o.result}  {o.seconds:6.1f} s  {o.reason}".rstrip() for o in outcomes
    )


def _measured(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser("python -m benches.gpu_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    default = Path(os.environ.get("OUT") or _ROOT / "build" / "gpu-check")
    parser.add_argument("--out", type=Path, default=default, help="folder for what was found")
    parser.add_argument("--quick", action="store_true", help="memcheck and small benchmarks only")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and limits")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    todo = steps(out, options.quick)
    if options.dry_run:
        for step in todo:
            extra = " ".join(f"{name}={value}" for name, value in step.environment.items())
            note = f"  [skip: {step.impossible}]" if step.impossible else ""
            print(f"{step.name} (at most {step.limit:.0f} s){note}")
            print(f"    {extra} {' '.join(step.command).strip()}".replace("     ", "    "))
        return 0

    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu-check.log"
    for stale in (log, out / "on-gpu.json", out / "benchmark.json"):
        stale.unlink(missing_ok=True)
    surroundings = environment()
    print(f"for architecture {surroundings.get('TORCH_CUDA_ARCH_LIST', '(none found)')}")
    outcomes: list[Outcome] = []
    for step in todo:
        left = BUDGET - (time.monotonic() - begin)
        outcomes.append(run(step, left, log, surroundings))
        report = {
            "steps": [asdict(outcome) for outcome in outcomes],
            "seconds": time.monotonic() - begin,
            "on_gpu": _measured(out / "on-gpu.json"),
        }
        (out / "gpu-check.json").write_text(json.dumps(report, indent=1) + "\n")
        if step.essential and outcomes[-1].result == "FAIL":
            print(f"== without {step.name} the rest is worth nothing")
            break
    print(f"\n{table(outcomes)}\n{out}")
    return 1 if any(outcome.result == "FAIL" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
