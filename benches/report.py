"""Runs the benchmarks; writes medians to benches/results and tables to docs/benchmarks.md.

    python -m benches.report                  run pytest benches, step_cost and in_turns
    python -m benches.report --repeat 3       run pytest three times and take medians
    python -m benches.report --device cuda    run on a GPU, with benches.on_gpu
    python -m benches.report FILE...          run nothing; use JSON files of earlier runs
    python -m benches.report --dry-run        print the tables and write nothing

FILE is a file of benches/results, or written by `pytest benches --benchmark-json FILE` or by
`python -m benches.MODULE --json FILE`, where MODULE is step_cost, in_turns or on_gpu. A file of
benches/results together with a newer one of a MODULE: replaces that part of the results.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benches.hardware import LEAST_FREE
from benches.tables import render
from docs import blocks

_ROOT = Path(__file__).parent.parent
_RESULTS = _ROOT / "benches" / "results"
_PAGE = _ROOT / "docs" / "benchmarks.md"

_MOST_SPREAD = 0.2
"""Largest interquartile range, relative to the median, of a timing to be published."""

Report = dict[str, Any]


def run_all(device: str, repeat: int) -> list[Report]:
    """Run pytest `repeat` times and the other benchmarks once; return what they wrote."""
    found = []
    for turn in range(repeat):
        timings_only = ("--benchmark-only",) if turn else ()
        report = _run(
            "pytest", "--benchmark-json", "benches", "-q", "--device", device, *timings_only
        )
        if report is None:
            sys.exit("benches.report: the benchmarks failed, so nothing is reported")
        found.append(report)
    other = ("benches.on_gpu",) if device == "cuda" else ("benches.in_turns",)
    for module, *options in (("benches.step_cost", "--device", device), other):
        report = _run(module, "--json", *options)
        if report is None:
            print(f"benches.report: {module} failed and is left out", file=sys.stderr)
        else:
            found.append(report)
    return found


def _run(module: str, json_option: str, *arguments: str) -> Report | None:
    """Run a module that writes a JSON file; return its content, or None if the module failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", module, *arguments, json_option, str(out)]
        done = subprocess.run(command, cwd=_ROOT, check=False)
        return json.loads(out.read_text()) if done.returncode == 0 and out.exists() else None


_PARTS = {"in_turns": "in_turns", "parts": "on_gpu", "steps": "step_cost"}
"""Keys that tell which module wrote a file, and the names of these parts in a report."""


def combine(found: Sequence[Report]) -> Report:
    """Combine files of one machine and version: medians, spread, and the parts of modules."""
    finished = [report for report in found if "cases" in report]
    runs = [report for report in found if "benchmarks" in report]
    if not (finished or runs):
        sys.exit("benches.report: expected a file of `pytest benches --benchmark-json`")
    others = [r for r in found if _PARTS.keys() & r.keys() and "cases" not in r]
    where: Report = finished[0] if finished else runs[0]["machine_info"]["benches"]
    for other in (*(run["machine_info"]["benches"] for run in runs), *others):
        for key in ("hardware", "versions", "backend"):
            if other[key] != where[key]:
                sys.exit(f"benches.report: expected runs on one machine, got a different {key}")
    report = dict(where)
    if not finished:
        repeats = Counter(timing["fullname"] for run in runs for timing in run["benchmarks"])
        report |= {"runs": max(repeats.values(), default=0), "cases": _cases(runs)}
    for other in others:
        for key, part in _PARTS.items():
            if key in other:
                report[part] = report.get(part, {}) | _without_machine(other, key)
    return report


def _without_machine(report: Report, key: str) -> Report:
    """Return what a module measured, and for the training steps what is missing, and when."""
    if key == "steps":
        return {name: report[name] for name in ("steps", "missing", "date", "simd")}
    measured: Report = report[key]
    return measured


def _cases(runs: Sequence[Report]) -> dict[str, Any]:
    """Return, per case and contestant, the median of the runs' medians and the worst spread."""
    timings: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for timing in run["benchmarks"]:
            if "free" in timing["extra_info"]:  # else it was interrupted
                timings.setdefault(timing["fullname"], []).append(timing)
    cases: dict[str, Any] = {}
    for same in timings.values():
        infos = [timing["extra_info"] for timing in same]
        case = cases.setdefault(
            infos[0]["case"],
            {
                **{key: infos[0][key] for key in ("threads", "title", "tensors", "bytes")},
                **{key: {} for key in ("median_s", "iqr_s", "free", "wrong")},
            },
        )
        contestant = infos[0]["contestant"]
        case["median_s"][contestant] = statistics.median(t["stats"]["median"] for t in same)
        case["iqr_s"][contestant] = max(t["stats"]["iqr"] for t in same)
        shares = [info["free"] for info in infos if info["free"] is not None]
        case["free"][contestant] = min(shares, default=None)
        on_device = [info["device_s"] for info in infos if "device_s" in info]
        if on_device:
            case.setdefault("device_s", {})[contestant] = statistics.median(on_device)
    for run in runs:
        for name, wrong in run.get("wrong", {}).items():
            if name in cases:  # else nothing of it was timed
                cases[name]["wrong"] |= wrong
    return cases


def noisy(report: Report) -> list[str]:
    """Describe the timings that should be repeated: large spread, or other programs running."""
    timings = [
        (f"{name}, {contestant}", case["iqr_s"][contestant] / median, case["free"][contestant])
        for name, case in report["cases"].items()
        for contestant, median in case["median_s"].items()
    ]
    for name, step in report.get("step_cost", {}).get("steps", {}).items():
        for tool, timing in step["tools"].items():
            low, high = timing["step_quartiles_s"]
            timings.append((f"step of {name}, {tool}", (high - low) / timing["step_s"], None))
    return [
        f"{what}: spread {spread:.0%}" + ("" if free is None else f", {free:.0%} of the CPU free")
        for what, spread, free in timings
        if spread > _MOST_SPREAD or (free is not None and free < LEAST_FREE)
    ]


def main() -> None:
    parser = argparse.ArgumentParser("python -m benches.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="of earlier runs")
    parser.add_argument("--repeat", type=int, default=1, help="how often to run pytest")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dry-run", action="store_true", help="print the tables, write nothing")
    options = parser.parse_args()
    files = [json.loads(path.read_text()) for path in options.files if path.exists()]
    if options.files and not files:
        parser.error("none of the files exists")
    report = combine(files or run_all(options.device, options.repeat))
    tables = render(report)
    if report.get("dry_run"):
        print("Numbers of a dry run on a fake device: they measure nothing.")
    for timing in noisy(report):
        print(f"noisy, better measured again: {timing}")
    print(tables, end="\n\n")  # last, where it is seen
    if options.dry_run:
        return
    if report.get("dry_run"):
        sys.exit("benches.report: these are numbers of a dry run, which are not published")
    hardware = report["hardware"]
    name = f"{hardware['gpu'] or hardware['cpu']} {hardware['threads']} threads"
    path = _RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    block = "benchmark" if report["device"] == "cpu" else f"benchmark-{report['device']}"
    blocks.write(_PAGE, block, tables)
    print(f"wrote {path.relative_to(_ROOT)} and {_PAGE.relative_to(_ROOT)}")


if __name__ == "__main__":
    main()
