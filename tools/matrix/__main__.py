"""Runs the rows of the real-world matrix, prints them, and writes docs/compatibility.md."""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import paramstats
from docs import blocks
from paramstats._core import backend as backends
from tools.matrix.rows import ROWS, Outcome, run_row

THEMES = {
    "training": "Ways to train",
    "wrappers": "What is put around a model",
    "numbers": "Kinds of numbers",
    "processes": "Processes and signals",
    "architectures": "Architectures",
}
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
LIBRARIES = ("torch", "transformers", "peft", "torchao", "bitsandbytes", "torch-geometric", "e3nn",
             "neuraloperator", "accelerate", "scikit-learn", "numpy")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.matrix", description=__doc__)
    parser.add_argument(
        "--only", metavar="WORD", help="rows with this in their name or title; writes no page"
    )
    parser.add_argument("--list", action="store_true", help="the rows' names and titles")
    arguments = parser.parse_args()
    for theme in THEMES:
        importlib.import_module(f"tools.matrix.{theme}")
    word = (arguments.only or "").lower()
    rows = [row for row in ROWS if word in f"{row.name}\n{row.title}".lower()]
    if not rows:
        print(f"no row has '{arguments.only}' in its name; --list shows all", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(f"{row.name:50} {row.title}" for row in rows))
        return 0
    both = [backends.choose("native"), backends.choose("reference")]
    outcomes = []
    start = time.perf_counter()
    for row in rows:
        outcome = run_row(row, both)
        outcomes.append(outcome)
        print(_line(outcome), flush=True)
    failed = [o.row.name for o in outcomes if o.failures]
    not_run = sum(bool(outcome.not_run) for outcome in outcomes)
    print(f"{len(outcomes)} row{'s' if len(outcomes) > 1 else ''}, {not_run} not run, "
          f"{len(failed)} failed {failed or ''}".rstrip())  # fmt: skip
    if arguments.only is None and not failed:
        blocks.write(PAGE, "matrix", page(outcomes, (time.perf_counter() - start) / 60))
    return int(bool(failed) or not_run == len(outcomes))


def _line(outcome: Outcome) -> str:
    compared = max(outcome.compared.values(), default=0)
    said = outcome.of("native")
    if outcome.of("reference") != said:
        said = f"native {said}; reference {outcome.of('reference')}"
    lines = [f"{outcome.row.name:45} {compared:6} {outcome.seconds:6.1f} s  {said}"]
    lines += [f"    {message}" for message in (*outcome.messages, outcome.remark) if message]
    return "\n".join(lines)


def page(outcomes: Sequence[Outcome], minutes: float) -> str:
    """What docs/compatibility.md shows of a run: a table for each theme, messages, versions."""
    parts: list[str] = []
    for theme, title in THEMES.items():
        rows = [_cells(outcome) for outcome in outcomes if outcome.row.theme == theme]
        table = blocks.table(("what", "native", "reference", "tensors", ""), rows, right=[3])
        parts += [f"## {title}", table]
    messages = [
        (outcome.row.title, f"{kind}: `{text}`")
        for outcome in outcomes
        for kind, _, text in (message.partition(": ") for message in outcome.messages)
    ]
    parts.append("## What is refused or skipped, and its message")
    parts.append(blocks.table(("what", "message"), messages))
    run = [outcome for outcome in outcomes if not outcome.not_run]
    compared = sum(max(outcome.compared.values(), default=0) for outcome in run)
    versions = [f"{name} {version}" for name in LIBRARIES if (version := _version(name))]
    parts.append(
        f"{len(run)} of {len(outcomes)} rows run, {compared:,} tensors compared by each backend, in "
        f"{minutes:.0f} min: paramstats {paramstats.__version__}, Python "
        f"{platform.python_version()}, {platform.system()} on {platform.machine()}, "
        f"{', '.join(versions)}; {datetime.date.today().isoformat()}."
    )
    return "\n\n".join(parts)


def _cells(outcome: Outcome) -> tuple[str, ...]:
    said = ["not run"] * 2
    if not outcome.not_run:
        said = [outcome.of(backend) for backend in ("native", "reference")]
    compared = max(outcome.compared.values(), default=0)
    tensors = f"{compared:,}" if compared else ""
    return (outcome.row.title, *said, tensors, outcome.not_run or outcome.remark)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
