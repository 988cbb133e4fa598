"""Compares the speed of this tree with that of another revision.

    python -m benches.compare REVISION [ROUNDS]

Checks REVISION out in a temporary git worktree and builds it there. Each round then runs the
benchmarks of compare_cases.py once in each tree, so that both see the same changes in the load of
the machine. Prints the ratio of the medians in each round. On a busy machine, OMP_NUM_THREADS=1
gives steadier ratios.
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
    medians: dict[str, dict[str, list[float]]] = {}
    for turn in range(rounds):
        for tree in sorted(trees, reverse=turn % 2 == 1):
            out = folder / "out.json"
            options = (f"--benchmark-json={out}", f"--rootdir={folder}", cases)
            _run((sys.executable, *_PYTEST, *options), folder, PYTHONPATH=str(trees[tree]))
            for timing in json.loads(out.read_text())["benchmarks"]:
                by_tree = medians.setdefault(timing["name"], {name: [] for name in trees})
                by_tree[tree].append(timing["stats"]["median"])
    for name, by_tree in medians.items():
        ratios = [this / base for base, this in zip(*by_tree.values(), strict=True)]
        microseconds = statistics.median(by_tree["this"]) * 1e6
        print(
            f"{name:<34} this tree / base: {statistics.median(ratios):.3f} (rounds: "
            f"{min(ratios):.3f} to {max(ratios):.3f}); this tree: {microseconds:,.1f} us"
        )


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
