"""Compares the speed of this tree with that of another revision.

    python -m benches.compare REVISION [ROUNDS]

Checks REVISION out in a temporary git worktree and builds it there. Each round then runs the
benchmarks of compare_cases.py once in each tree, so that both see the same changes in the load of
the machine. Prints the ratio of the medians in each round, and pytest-benchmark's comparison of the
median runs. On a busy machine, OMP_NUM_THREADS=1 gives steadier ratios.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent
_CASES = Path(__file__).with_name("compare_cases.py")
_PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-max-time=0.3")


def _run(command: tuple[str, ...], cwd: Path, **environment: str) -> None:
    """Run a command; print its output and exit if it fails."""
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"benches.compare: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def _compare(base: Path, folder: Path, rounds: int) -> None:
    trees = {"base": base, "this": _ROOT}
    cases = str(shutil.copy(_CASES, folder))  # away from conftest.py, which needs this tree
    runs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in trees}
    for turn in range(rounds):
        for name in sorted(trees, reverse=turn % 2 == 1):
            out = folder / f"{name}.json"
            options = (f"--benchmark-json={out}", f"--rootdir={folder}", cases)
            _run((sys.executable, *_PYTEST, *options), folder, PYTHONPATH=str(trees[name]))
            runs[name].append(json.loads(out.read_text())["benchmarks"])
    median_runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    for case in zip(*runs["base"], *runs["this"], strict=True):  # a benchmark in all runs
        medians = [benchmark["stats"]["median"] for benchmark in case]
        ratios = [
            this / base for base, this in zip(medians[:rounds], medians[rounds:], strict=True)
        ]
        print(
            f"{case[0]['name']:<30} this tree / base: {statistics.median(ratios):.3f} "
            f"(rounds: {min(ratios):.3f} to {max(ratios):.3f})"
        )
        for name, same in (("base", case[:rounds]), ("this", case[rounds:])):
            by_median = sorted(same, key=lambda benchmark: benchmark["stats"]["median"])
            median_runs[name].append(by_median[rounds // 2])
    files = [folder / f"{name}.json" for name in trees]
    for name, file in zip(trees, files, strict=True):
        file.write_text(
            json.dumps({**json.loads(file.read_text()), "benchmarks": median_runs[name]})
        )
    columns = ("--group-by=name", "--columns=median,iqr,rounds")
    compare = (sys.executable, "-m", "pytest_benchmark", "compare", *columns, *map(str, files))
    subprocess.run(compare, check=True)


def main(revision: str = "HEAD", rounds: str = "6") -> None:
    with tempfile.TemporaryDirectory(prefix="paramstats-compare-") as name:
        base = Path(name) / "base"
        _run(("git", "worktree", "add", "--detach", str(base), revision), _ROOT)
        try:
            print(f"building {revision}, about a minute", flush=True)
            build = (sys.executable, "setup.py", "build_ext", "--inplace")
            _run(build, base, PYTHONPATH="", PARAMSTATS_STRICT_BUILD="1")
            _compare(base, Path(name), int(rounds))
        finally:
            _run(("git", "worktree", "remove", "--force", str(base)), _ROOT)


if __name__ == "__main__":
    main(*sys.argv[1:])
