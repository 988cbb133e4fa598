"""The last result of the campaign, for docs/robustness.md."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch

import paramstats
from benches.hardware import cpu_name
from docs import blocks
from paramstats._core import backend as backends
from tools.fuzz.campaign import Tally
from tools.fuzz.memory import Growth

PAGE = Path(__file__).parent.parent.parent / "docs" / "robustness.md"
WHAT = {
    "tensors": "the native entry reads a list of tensors",
    "tables": "the native entry merges rows and makes statistics",
    "summaries": "`summarize` of mappings and pairs, 3 in 10 with the reference backend",
    "modules": "`summarize` of hostile modules, 2 in 10 with the reference backend",
    "racing": "`summarize` while two threads change the model, 2 in 10 with the reference backend",
}


def text(tallies: dict[str, Tally], growths: list[Growth], seconds: float) -> str:
    executions, crashes, hangs, wrong = (
        sum(getattr(t, field) for t in tallies.values())
        for field in ("executions", "crashes", "hangs", "wrong")
    )
    everything = Tally(executions, crashes, hangs, wrong, seconds)
    rows = [(kind, WHAT[kind], t) for kind, t in tallies.items()]
    rows.append(("all", "two processes at a time, then memory", everything))
    tallied = blocks.table(
        ("kind", "what", "executions", "crashes", "hangs", "wrong", "seconds"),
        [
            (kind, what, f"{t.executions:,}", *map(str, (t.crashes, t.hangs, t.wrong)),
             f"{t.seconds:.0f}")
            for kind, what, t in rows
        ],
        right=range(2, 7),
    )  # fmt: skip
    grown = blocks.table(
        ("memory, by the path of a call", "calls", "more MiB", "more Python memory blocks",
         "more references", "more cached layouts"),
        [
            (g.path, f"{g.calls:,}", f"{g.mebibytes:.2f}",
             *map(str, (g.blocks, g.references, g.layouts)))
            for g in growths
        ],
        right=range(1, 6),
    )  # fmt: skip
    levels = ", ".join(backends.active().native.simd_levels())
    made_on = (
        f"{datetime.date.today():%Y-%m-%d} on {cpu_name()}, {os.cpu_count()} cores; paramstats "
        f"{paramstats.__version__} (SIMD levels {levels}), torch {torch.__version__}, Python "
        f"{platform.python_version()}."
    )
    return f"{tallied}\n\n{grown}\n\n{made_on}"


def write(content: str) -> None:
    blocks.write(PAGE, "fuzz", content)
