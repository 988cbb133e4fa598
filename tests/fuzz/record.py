"""The last result of the campaign, for docs/robustness.md."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import paramstats
from docs import blocks
from paramstats import engine as engines

if TYPE_CHECKING:
    from tests.fuzz.campaign import Tally
    from tests.fuzz.memory import Growth

PAGE = Path(__file__).parent.parent.parent / "docs" / "robustness.md"
WHAT = {
    "tensors": "the native entry reads a list of tensors",
    "tables": "the native entry merges rows and makes figures",
    "summaries": "`summarize` of mappings and pairs, 3 in 10 with the reference engine",
    "modules": "`summarize` of hostile modules, 2 in 10 with the reference engine",
    "racing": "`summarize` while two threads change the model, 2 in 10 with the reference engine",
}


def text(tallies: dict[str, Tally], growths: list[Growth], seconds: float) -> str:
    lines = [
        "| kind | what | executions | crashes | hangs | wrong | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, t in tallies.items():
        lines.append(
            f"| {kind} | {WHAT[kind]} | {t.executions:,} | {t.crashes} | {t.hangs} | {t.wrong} | "
            f"{t.seconds:.0f} |"
        )
    executions, crashes, hangs, wrong = (
        sum(getattr(t, field) for t in tallies.values())
        for field in ("executions", "crashes", "hangs", "wrong")
    )
    lines += [
        f"| all | two processes at a time, then memory | {executions:,} | {crashes} | {hangs} | "
        f"{wrong} | {seconds:.0f} |",
        "",
        "| memory, by the path of a call | calls | more MiB | more Python memory blocks | "
        "more references | more cached layouts |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for g in growths:
        lines.append(
            f"| {g.path} | {g.calls:,} | {g.mebibytes:.2f} | {g.blocks} | {g.references} | "
            f"{g.layouts} |"
        )
    levels = ", ".join(engines.engine().native.simd_levels())
    lines += [
        "",
        f"{datetime.date.today():%Y-%m-%d} on {_processor()}, {os.cpu_count()} cores; paramstats "
        f"{paramstats.__version__} (SIMD levels {levels}), torch {torch.__version__}, Python "
        f"{platform.python_version()}.",
    ]
    return "\n".join(lines)


def write(content: str) -> None:
    blocks.write(PAGE, "fuzz", content)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
