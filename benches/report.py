"""Runs the benchmarks and writes what came out: a JSON file of medians, and the README's tables.

    python -m benches.report                      runs `pytest benches` and benches.step_cost first
    python -m benches.report --repeat 3           three times, against slow spells of the machine
    python -m benches.report --json FILE ...      takes what `pytest benches --benchmark-json` wrote
    python -m benches.report --dry-run            prints, and writes nothing
    python -m benches.report --device cuda        on a GPU; runs `python -m benches.on_gpu`, too
    python -m benches.report --json FILE ... --step-cost FILE   takes what both of them wrote
    python -m benches.report --json FILE ... --on-gpu FILE      the same for a GPU

Of several runs, each statistic is the median of their medians, spread and company the worst; the
training steps are measured once.
The tables go between two lines of README.md, <!-- benchmark:begin --> and <!-- benchmark:end -->
(benchmark-cuda for a run on CUDA).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benches.hardware import LEAST_FREE
from benches.tables import render
from docs import blocks

_HERE = Path(__file__).parent
_RESULTS = _HERE / "results"
_README = _HERE.parent / "README.md"

_MOST_SPREAD = 0.2
"""Interquartile range, in parts of the median, that a timing to be published may have."""

Report = dict[str, Any]


def run(device: str, timings_alone: bool = False) -> dict[str, Any]:
    """Everything that pytest-benchmark has to say about a run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", str(_HERE), "-q", "--device", device]
        if timings_alone:
            command.append("--benchmark-only")
        done = subprocess.run([*command, f"--benchmark-json={out}"], cwd=_HERE.parent, check=False)
        if done.returncode != 0 or not out.exists():
            sys.exit("benches.report: the benchmarks did not pass, so nothing is reported")
        return json.loads(out.read_text())  # type: ignore[no-any-return]


def run_module(module: str) -> dict[str, Any] | None:
    """What is no contest between contestants; None where it could not be measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = (sys.executable, "-m", module, "--json", str(out))
        done = subprocess.run(command, cwd=_HERE.parent, check=False)
        if done.returncode != 0:
            print(f"benches.report: {module} ended with {done.returncode}", file=sys.stderr)
        return json.loads(out.read_text()) if out.exists() else None


def joined(report: Report, other: dict[str, Any]) -> Report:
    """One report of both, of the same machine and versions."""
    for key in ("hardware", "versions", "backend"):
        if report[key] != other[key]:
            sys.exit(f"benches.report: expected both on one machine, got another {key}")
    if "parts" in other:
        return {**report, "on_gpu": other["parts"]}
    return {**report, "step_cost": {key: other[key] for key in ("steps", "missing", "quick")}}


def condense(runs: list[dict[str, Any]]) -> Report:
    """Medians by case and contestant, how steady they were, and where they were measured."""
    where = [run.get("machine_info", {}).get("benches") for run in runs]
    if None in where:
        sys.exit("benches.report: expected files of `pytest benches --benchmark-json`")
    if any(other != where[0] for other in where):
        sys.exit("benches.report: expected runs of one day, machine and version")
    entries: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for entry in run["benchmarks"]:
            if "free" not in entry["extra_info"]:
                continue  # interrupted while it was measured
            entries.setdefault(entry["fullname"], []).append(entry)
    if not entries:
        sys.exit("benches.report: nothing was measured (see the reasons of what was skipped)")
    cases: dict[str, Any] = {}
    for same in entries.values():
        infos = [entry["extra_info"] for entry in same]
        about = dict(infos[0])
        contestant, errors = about.pop("contestant"), about.pop("errors", None)
        shares = [info["free"] for info in infos if info["free"] is not None]
        on_device = [info["device_s"] for info in infos if info.get("device_s") is not None]
        about.pop("free"), about.pop("device_s", None)
        empty: dict[str, Any] = {"median_s": {}, "iqr_s": {}, "free": {}, "error": {}}
        case = cases.setdefault(about.pop("case"), {**about, **empty})
        case["median_s"][contestant] = statistics.median(e["stats"]["median"] for e in same)
        case["iqr_s"][contestant] = max(entry["stats"]["iqr"] for entry in same)
        case["free"][contestant] = min(shares, default=None)
        if errors:
            case["error"][contestant] = errors
        if on_device:
            case.setdefault("device_s", {})[contestant] = statistics.median(on_device)
    return {**where[0], "runs": len(runs), "cases": cases}


def noisy(report: Report) -> list[str]:
    """Medians that a second run may not confirm, and why."""
    found = []
    for name, case in report["cases"].items():
        for contestant, median in case["median_s"].items():
            spread, free = case["iqr_s"][contestant] / median, case["free"][contestant]
            if spread > _MOST_SPREAD or (free is not None and free < LEAST_FREE):
                free_text = "" if free is None else f", {free:.0%} of the processors free"
                found.append(f"{name}: {contestant}, spread {spread:.0%}{free_text}")
    for name, step in report.get("step_cost", {}).get("steps", {}).items():
        for tool, timing in step["tools"].items():
            low, high = timing["step_quartiles_s"]
            spread, free = (high - low) / timing["step_s"], timing["free"]
            company = free is not None and free < LEAST_FREE and tool != "wandb_watch"  # its own
            if spread > _MOST_SPREAD or company:
                free_text = "" if free is None else f", {free:.0%} of the processors free"
                found.append(f"a step of {name}: {tool}, spread {spread:.0%}{free_text}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser("python -m benches.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, nargs="+", help="of pytest benches --benchmark-json")
    parser.add_argument("--step-cost", type=Path, help="of benches.step_cost --json; with --json")
    parser.add_argument("--on-gpu", type=Path, help="of benches.on_gpu --json; with --json")
    parser.add_argument("--repeat", type=int, default=1, help="how often to run them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--name", help="of the file in benches/results (default: the processor's)")
    parser.add_argument("--dry-run", action="store_true", help="print the tables, write nothing")
    options = parser.parse_args()

    if options.json:
        runs = [json.loads(path.read_text()) for path in options.json]
    else:
        runs = [run(options.device, timings_alone=turn > 0) for turn in range(options.repeat)]
    report = condense(runs)
    other = None
    if options.json:
        path = options.on_gpu or options.step_cost
        if path and path.exists():  # benches.gpu_check names it in any case
            other = json.loads(path.read_text())
    else:
        other = run_module("benches.on_gpu" if options.device == "cuda" else "benches.step_cost")
    if other is not None:
        report = joined(report, other)
    hardware = report["hardware"]
    name = options.name or f"{hardware['gpu'] or hardware['cpu']} {hardware['threads']} threads"
    path = _RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    tables = render(report)
    print(tables, end="\n\n")
    for what in noisy(report):
        print(f"noisy, better measured again: {what}")
    if options.dry_run:
        return
    _RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"medians: {path.relative_to(_HERE.parent)}")
    block = "benchmark" if report["device"] == "cpu" else f"benchmark-{report['device']}"
    blocks.write(_README, block, tables)


if __name__ == "__main__":
    main()
