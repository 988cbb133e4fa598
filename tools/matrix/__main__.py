"""Runs the compatibility matrix, prints its rows and writes docs/compatibility.md."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import paramstats
from docs import blocks
from paramstats._core import backend as backends
from tools.matrix.rows import ROWS, Outcome, run_row

THEMES = {
    "training": "Ways to train",
    "wrappers": "Wrappers and transforms",
    "numbers": "Quantization and number formats",
    "processes": "Processes",
    "architectures": "Architectures",
}
PAGE = Path(__file__).parents[2] / "docs/compatibility.md"
LIBRARIES = ("torch", "transformers", "peft", "torchao", "bitsandbytes", "torch-geometric", "e3nn",
             "neuraloperator", "accelerate", "scikit-learn", "numpy")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.matrix", description=__doc__)
    parser.add_argument("--only", metavar="WORD", default="", help="rows with WORD in their name "
                        "or title; leaves the page as it is")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the rows' names and titles")
    options = parser.parse_args()
    for theme in THEMES:
        importlib.import_module(f"tools.matrix.{theme}")
    word = options.only.lower()
    rows = [row for row in ROWS if word in f"{row.name}\n{row.title}".lower()]
    if options.list or not rows:
        print("\n".join(f"{row.name:40} {row.title}" for row in ROWS))
        return int(not rows)
    both = [backends.choose("native"), backends.choose("reference")]
    outcomes = []
    for row in rows:
        outcome = run_row(row, both)
        outcomes.append(outcome)
        print(f"{row.name:40} {outcome.compared:6} {outcome.seconds:6.1f} s  {outcome.summary}")
        for line in (*outcome.messages, outcome.remark):
            if line:
                print(f"    {line}", flush=True)
    failed = [outcome.row.name for outcome in outcomes if outcome.failures]
    not_run = sum(bool(outcome.not_run) for outcome in outcomes)
    print(f"{len(outcomes)} rows, {not_run} not run, {len(failed)} failed {failed or ''}")
    if not word and not failed:
        blocks.write(PAGE, "matrix", page(outcomes))
    return int(bool(failed) or not_run == len(outcomes))


def page(outcomes: Sequence[Outcome]) -> str:
    """The generated part of docs/compatibility.md: a table for each theme, messages, versions."""
    parts: list[str] = []
    for theme, title in THEMES.items():
        rows = [
            (o.row.title, o.summary, f"{o.compared:,}" if o.compared else "", o.remark)
            for o in outcomes
            if o.row.theme == theme
        ]
        head = ("model or use", "result with both backends", "tensors", "remarks")
        parts += [f"## {title}", blocks.table(head, rows, right=[2])]
    messages = [
        (outcome.row.title, f"{kind}: `{text}`")
        for outcome in outcomes
        for kind, _, text in (message.partition(": ") for message in outcome.messages)
    ]
    parts.append("## Messages of refused and skipped tensors")
    parts.append(blocks.table(("model or use", "message"), messages))
    compared = sum(outcome.compared for outcome in outcomes)
    versions = [f"{name} {version}" for name in LIBRARIES if (version := _version(name))]
    parts.append(
        f"{compared:,} tensors compared with each backend: paramstats {paramstats.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} on {platform.machine()}, "
        f"{', '.join(versions)}; {date.today()}."
    )
    return "\n\n".join(parts)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
