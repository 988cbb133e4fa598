"""Whether a change made paramstats faster or slower: another revision against the tree as it is.

    python -m benches.compare HEAD                    what is not committed yet
    python -m benches.compare main --cases bfloat16   cases with that in their name
    python -m benches.compare HEAD~3 --pairs 10       more pairs of processes: narrower intervals

Both trees are copied and built in a temporary folder; what git ignores stays behind. Then a process
of each is asked in alternation for a turn of some 30 ms, so that a slow spell of the machine hits
both. How a process happens to lie in memory makes it some percent faster or slower for as long as
it lives, so that there are several pairs of processes, one after the other.

The ratio of a case is the median of its turns' ratios. The interval holds it in 99 of 100 draws
(bootstrap) of pairs, and of turns within each; of five pairs that is too narrow, and where
processes differ by 3 % a case in twenty is marked by chance: ask again with more pairs. A change is
marked where the interval leaves out 1 and the ratio is 2 % or more from it. The exit status is 1
where a case is marked as slower.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benches import compare_worker, hardware

_ROOT = Path(__file__).parent.parent
_BUILT_FROM = ("csrc", "setup.py")
_DRAWS = 2000
_CONFIDENCE = 0.99
_LEAST_CHANGE = 0.02
_SAME = 2e-6


# ---- two trees ----------------------------------------------------------------------------------


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"benches.compare: git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def worktree(revision: str, folder: Path) -> Iterator[Path]:
    """A revision, checked out until the context ends."""
    _git("worktree", "add", "--quiet", "--detach", str(folder), revision)
    try:
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


def copy_present(folder: Path) -> Path:
    """The tree as it is, with what is not committed and without what git ignores."""
    for name in _git("ls-files", "-co", "--exclude-standard", "-z").split("\0"):
        source = _ROOT / name
        if name and source.is_file():  # it may be deleted, and not yet committed as such
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    return folder


def build(tree: Path) -> None:
    """The native backend, in place; there is nothing to compare without it."""
    environment = {**os.environ, "PARAMSTATS_STRICT_BUILD": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"benches.compare: {tree.name} does not build:\n{(done.stdout + done.stderr)}")


def same_backend(one: Path, other: Path) -> bool:
    """Whether both trees' backends are built from the same files."""
    return _files(one, _BUILT_FROM) == _files(other, _BUILT_FROM)


def same_python(one: Path, other: Path) -> bool:
    return _files(one, ("paramstats",), ".py") == _files(other, ("paramstats",), ".py")


def _files(tree: Path, names: Sequence[str], suffix: str = "") -> dict[str, bytes]:
    paths = [path for name in names for path in (tree / name, *(tree / name).rglob("*"))]
    return {
        str(path.relative_to(tree)): path.read_bytes()
        for path in paths
        if path.is_file() and path.name.endswith(suffix)
    }


def copy_engine(source: Path, target: Path) -> None:
    for path in (*source.glob("paramstats/*.so"), source / "paramstats/_build.json"):
        (target / "paramstats" / path.name).write_bytes(path.read_bytes())


# ---- two processes ------------------------------------------------------------------------------


class Process:
    """A worker that imports paramstats from `tree`, asked over pipes."""

    def __init__(self, tree: Path) -> None:
        code = Path(compare_worker.__file__).read_text()  # of this tree, whatever the other has
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        hello = self._answer()
        package = (tree / "paramstats").resolve()
        if Path(hello["package"]).resolve() != package or hello["backend"] != "native":
            sys.exit(f"benches.compare: expected the native backend of {package}, got {hello}")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(command)}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("benches.compare: a worker ended; what it said is above")
        return json.loads(line)  # type: ignore[no-any-return]


Turn = tuple[float, float]
"""Seconds a call of the base and of the present tree."""


def measure_pair(trees: tuple[Path, Path], cases: Sequence[str], turns: int) -> list[list[Turn]]:
    """The turns of each case, by one pair of processes; who begins changes with the turn."""
    with Process(trees[0]) as base, Process(trees[1]) as now:
        found = []
        for case in cases:
            statistics = [process.ask(build=case)["statistics"] for process in (base, now)]
            if not _same_figures(*statistics):
                sys.exit(
                    f"benches.compare: {case}: expected {statistics[0]} again, got {statistics[1]}"
                )
            seconds = []
            for turn in range(turns):
                order = (base, now) if turn % 2 == 0 else (now, base)
                one, other = (process.ask()["seconds"] for process in order)
                seconds.append((one, other) if turn % 2 == 0 else (other, one))
            found.append(seconds)
    return found


def _same_figures(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(
        math.isclose(a, b, rel_tol=_SAME, abs_tol=_SAME) for a, b in zip(one, other, strict=True)
    )


# ---- what came out ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A case's medians, and the ratio of the present tree's time to the base's."""

    base: float
    now: float
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Empty within the noise."""
        if self.low <= 1 <= self.high or abs(self.ratio - 1) < _LEAST_CHANGE:
            return ""
        return "faster" if self.ratio < 1 else "SLOWER"


def change(pairs: Sequence[Sequence[Turn]], seed: int = 0) -> Change:
    """From the turns of each pair of processes."""
    ratios = [[now / base for base, now in turns] for turns in pairs]
    draw = random.Random(seed)
    medians = sorted(
        statistics.median(
            ratio
            for pair in draw.choices(ratios, k=len(ratios))
            for ratio in draw.choices(pair, k=len(pair))
        )
        for _ in range(_DRAWS)
    )
    outside = round(_DRAWS * (1 - _CONFIDENCE) / 2)
    return Change(
        statistics.median(base for turns in pairs for base, _ in turns),
        statistics.median(now for turns in pairs for _, now in turns),
        statistics.median(ratio for pair in ratios for ratio in pair),
        medians[outside],
        medians[-1 - outside],
    )


def row(case: str, change: Change) -> str:
    return (
        f"{case:<28} {_time(change.base):>10} {_time(change.now):>10} {change.ratio:7.3f}"
        f"   {change.low:.3f} to {change.high:.3f}   {change.verdict}"
    ).rstrip()


HEAD = f"{'case':<28} {'base':>10} {'now':>10} {'ratio':>7}   {'99 %':<14}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.2f} us"


def main() -> int:
    parser = argparse.ArgumentParser("python -m benches.compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("base", help="the revision to compare with")
    parser.add_argument("--cases", nargs="+", default=[""], help="parts of their names")
    parser.add_argument("--turns", type=int, default=8, help="of each pair (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=5, help="of processes (default: %(default)s)")
    options = parser.parse_args()
    cases = [case for case in compare_worker.CASES if any(part in case for part in options.cases)]
    if hardware.cores() < 2:
        cases = [case for case in cases if "2 threads" not in case]
    if not cases:
        parser.error(f"expected parts of: {'; '.join(compare_worker.CASES)}")
    if options.turns < 1 or options.pairs < 1:
        parser.error("expected one turn and one pair at least")
    revision = _git("rev-parse", "--short", "--verify", f"{options.base}^{{commit}}").strip()
    with (
        tempfile.TemporaryDirectory(prefix="paramstats-compare-") as temporary,
        worktree(revision, Path(temporary) / "base") as base,
    ):
        now = copy_present(Path(temporary) / "now")
        print(f"building {revision}", flush=True)
        build(base)
        if same_backend(base, now):
            print("the present tree's C++ is the same: not built again", flush=True)
            if same_python(base, now):
                print("and so is its Python: what differs below is noise", flush=True)
            copy_engine(base, now)
        else:
            print("building the present tree", flush=True)
            build(now)
        free = hardware.FreeShare()
        pairs = [measure_pair((base, now), cases, options.turns) for _ in range(options.pairs)]
        share = free()
    if share is not None and share < hardware.LEAST_FREE:
        print(f"others took {1 - share:.0%} of the processors meanwhile: intervals are wide")
    print("ratio: the present tree's time in parts of the base's")
    print(HEAD)
    slower = False
    for case, turns in zip(cases, zip(*pairs, strict=True), strict=True):
        found = change(turns)
        slower |= found.verdict == "SLOWER"
        print(row(case, found))
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
