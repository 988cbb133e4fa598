"""Runs all kinds of cases in child processes, so that a crash or a hang has a seed.

A child writes the seed of each case into a file before it runs the case. Where a child crashes or
hangs, the campaign reports that seed and continues with the next one.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import mmap
import os
import platform
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import torch

import tools.fuzz
from tools.fuzz import memory

SHARES = {
    "modules": 60_000,
    "kinds": 300_000,
    "tensors": 237_500,
    "summaries": 80_000,
    "racing": 120_000,
    "tables": 200_000,
    "histories": 12_500,
    "ranks": 3_000,
    "changing_files": 2_500,
    "hostile_files": 1_250,
}
"""Executions of each kind in a campaign."""

BATCH = 20_000  # executions of one child
TIMEOUT = 300.0  # seconds without a new seed: a hang
PROCESSES = 2
_SEED = struct.Struct("=q")


@dataclasses.dataclass
class Tally:
    """The results of one kind."""

    executions: int = 0
    crashes: int = 0
    hangs: int = 0
    wrong: int = 0

    @property
    def failed(self) -> bool:
        return self.wrong + self.crashes + self.hangs > 0

    def __str__(self) -> str:
        return (
            f"{self.executions:,} executions, {self.wrong} wrong, {self.crashes} crashes, "
            f"{self.hangs} hangs"
        )


def run_here(
    kind: str, seed: int, count: int, progress: Path | None = None
) -> tuple[int, int, int]:
    """Runs cases in this process from `seed` on until `count` executions are done.

    Prints what is wrong. Returns executions, wrong cases and the next seed.
    """
    module = importlib.import_module(f"tools.fuzz.{kind}")
    current = None
    if progress is not None:
        with progress.open("r+b") as file:
            current = mmap.mmap(file.fileno(), _SEED.size)
    gc.freeze()  # some cases collect garbage often; torch's own objects need no visit
    executions = wrong = 0
    while executions < count:
        if current is not None:
            current[:] = _SEED.pack(seed)
        try:
            executions += module.run(seed)
        except Exception:
            wrong += 1
            executions += 1
            if wrong <= 5:
                print(f"{kind}, seed {seed}:\n{traceback.format_exc(limit=-4)[-2000:]}", flush=True)
        seed += 1
    gc.unfreeze()
    return executions, wrong, seed


def run_kind(kind: str, seed: int, count: int, timeout: float = TIMEOUT) -> Tally:
    """Runs cases in child processes, one after the other; prints failures with their seed."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "seed"
        while tally.executions < count and tally.hangs + tally.crashes <= 20:
            progress.write_bytes(_SEED.pack(seed))
            batch = min(BATCH, count - tally.executions)
            *lines, last = _child(kind, seed, batch, progress, timeout).splitlines() or [""]
            try:
                executions, wrong, seed = json.loads(last)
            except (ValueError, TypeError):  # the child did not reach its end
                failed = _SEED.unpack(progress.read_bytes())[0]
                hung = last == "hung"
                lines.append(f"{kind}, seed {failed}: {'hung' if hung else 'crashed'}")
                executions, wrong, seed = failed - seed + 1, 0, failed + 1
                tally.hangs += hung
                tally.crashes += not hung
            tally.executions += executions
            tally.wrong += wrong
            if lines:
                print("\n".join(lines), flush=True)
    print(f"{kind}: {tally}", flush=True)
    return tally


def _child(kind: str, seed: int, count: int, progress: Path, timeout: float) -> str:
    """The output of a child process; its last line is "hung" where it had to be killed."""
    command = [sys.executable, "-X", "faulthandler", "-m", "tools.fuzz.child"]
    command += [kind, str(seed), str(count), str(progress)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        last, since, hung = b"", time.monotonic(), False
        while child.poll() is None:
            time.sleep(0.2)
            now = progress.read_bytes()
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > timeout:
                hung = True
                child.kill()
        output.seek(0)
        return output.read() + ("\nhung" if hung else "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz",
        description=tools.fuzz.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=SHARES, help="cases of one kind")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case (default 0)")
    parser.add_argument("--count", type=int, default=1, help="executions with --only (default 1)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of a campaign (default 1)")
    options = parser.parse_args(arguments)
    if options.only:
        return int(run_kind(options.only, options.seed, options.count).failed)
    began = time.perf_counter()
    counts = [max(1, int(share * options.scale)) for share in SHARES.values()]
    with ThreadPoolExecutor(PROCESSES) as pool:
        tallies = list(pool.map(run_kind, SHARES, [options.seed] * len(SHARES), counts))
    calls = max(1000, int(memory.CALLS * options.scale))
    growths = memory.in_a_child(calls)
    print(*growths, sep="\n")
    parts = (dataclasses.astuple(tally) for tally in tallies)
    growing = sum(growth.grew for growth in growths)
    print(
        f"{Tally(*map(sum, zip(*parts, strict=True)))}; {len(growths)} paths of {calls:,} calls or "
        f"fewer, {growing} of which grow in memory; {time.perf_counter() - began:.0f} s; "
        f"{date.today()}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    return int(growing > 0 or any(tally.failed for tally in tallies))
