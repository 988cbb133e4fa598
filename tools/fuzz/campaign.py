"""The campaign: all kinds of cases in child processes, so that a crash has a number.

    python -m tools.fuzz                                    a million executions, 5 minutes
    python -m tools.fuzz --scale 0.001                      a thousand of them
    python -m tools.fuzz --only modules --seed 4 --count 1  one case

A child writes the seed of each case into a file before it runs it. One that dies or hangs is
reported with that seed, and its kind goes on behind it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

SHARES = {
    "modules": 60_000,
    "tensors": 450_000,
    "summaries": 80_000,
    "racing": 120_000,
    "tables": 300_000,
}
"""Executions of each kind in a campaign, at least."""

BATCH = 20_000  # executions of one child
TIMEOUT = 300.0  # seconds without a new seed: a hang
PROCESSES = 2
EVERY = 20.0  # seconds between two lines on how far a kind is
_PROGRESS = struct.Struct("=qq")  # the seed of the case that runs, and executions before it


@dataclasses.dataclass
class Tally:
    """What came of one kind."""

    executions: int = 0
    crashes: int = 0
    hangs: int = 0
    wrong: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.wrong} wrong, {self.crashes} crashes, {self.hangs} hangs"


def run_here(
    kind: str, seed: int, count: int, progress: Path | None = None
) -> tuple[int, int, int]:
    """Cases from `seed` on until `count` executions are done; prints what is wrong.

    Returns executions, wrong cases, and the next seed.
    """
    module = importlib.import_module(f"tools.fuzz.{kind}")
    shown = _shown(progress)
    gc.freeze()  # collections, of which some cases make many, need not look at torch
    executions = wrong = 0
    while executions < count:
        if shown is not None:
            shown[: _PROGRESS.size] = _PROGRESS.pack(seed, executions)
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


def _shown(progress: Path | None) -> mmap.mmap | None:
    if progress is None:
        return None
    with progress.open("r+b") as file:
        return mmap.mmap(file.fileno(), _PROGRESS.size)


def run_kind(kind: str, seed: int, count: int, timeout: float = TIMEOUT) -> Tally:
    """The same in children, one after the other; prints how far they are."""
    tally = Tally()
    began = told = time.perf_counter()

    def tell(executions: int) -> None:
        nonlocal told
        now = time.perf_counter()
        if now - told >= EVERY:
            told = now
            so_far = f"{tally.executions + executions:,} of {count:,} executions"
            print(f"{kind}: {so_far} in {now - began:.0f} s, {tally}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "seed"
        while tally.executions < count:
            progress.write_bytes(_PROGRESS.pack(seed, 0))
            batch = min(BATCH, count - tally.executions)
            output, hung = _child(kind, seed, batch, progress, timeout, tell)
            try:
                result = json.loads(output.splitlines()[-1])
                executions, wrong, seed = result["done"]
            except (ValueError, IndexError, KeyError, TypeError):
                last, _ = _PROGRESS.unpack(progress.read_bytes())
                print(f"{kind}, seed {last}: {'hung' if hung else 'crashed'}", flush=True)
                output += "\n"
                executions, wrong, seed = last - seed + 1, 0, last + 1
                tally.hangs += hung
                tally.crashes += not hung
                if tally.hangs + tally.crashes > 20:
                    break
            tally.executions += executions
            tally.wrong += wrong
            _print_findings(output)
    tally.seconds = time.perf_counter() - began
    return tally


def _child(
    kind: str, seed: int, count: int, progress: Path, timeout: float, tell: Callable[[int], None]
) -> tuple[str, bool]:
    """What a child printed, and whether it had to be ended."""
    command = [sys.executable, "-X", "faulthandler", "-m", "tools.fuzz.child"]
    command += [kind, str(seed), str(count), str(progress)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        last, since, hung = b"", time.monotonic(), False
        while child.poll() is None:
            time.sleep(0.2)
            now = progress.read_bytes()
            tell(_PROGRESS.unpack(now)[1])
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > timeout:
                hung = True
                child.kill()
        output.seek(0)
        return output.read(), hung


def _print_findings(output: str) -> None:
    lines = output.splitlines()[:-1]
    if lines:
        print("\n".join(lines), flush=True)


def _print_tally(kind: str, seed: int, tally: Tally) -> None:
    done = f"{tally.executions:,} execution{'s' if tally.executions != 1 else ''}"
    print(f"{kind}: {done} from seed {seed}, {tally}, {tally.seconds:.0f} s", flush=True)


def run_all(scale: float, seed: int) -> dict[str, Tally]:
    """Every kind, PROCESSES of them at a time."""
    left = list(SHARES.items())
    tallies: dict[str, Tally] = {}
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not left:
                    return
                kind, share = left.pop(0)
            tallies[kind] = run_kind(kind, seed, max(1, int(share * scale)))
            _print_tally(kind, seed, tallies[kind])

    workers = [threading.Thread(target=work) for _ in range(PROCESSES)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {kind: tallies[kind] for kind in SHARES}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=SHARES, help="cases of one kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first case (default 0)")
    parser.add_argument(
        "--count", type=int, metavar="N", help="executions, with --only (default 1)"
    )
    parser.add_argument(
        "--scale",
        type=float,
        metavar="FACTOR",
        help="of the campaign's executions, by default 1; --scale 0.001 is the small run",
    )
    parser.add_argument("--write", action="store_true", help="the result into docs/robustness.md")
    options = parser.parse_args(arguments)
    if options.only:
        if options.scale is not None or options.write:
            parser.error("--scale and --write belong to the campaign: leave them out, or --only")
        tally = run_kind(options.only, options.seed, 1 if options.count is None else options.count)
        _print_tally(options.only, options.seed, tally)
        return int(tally.wrong + tally.crashes + tally.hangs > 0)
    if options.count is not None:
        parser.error("--count needs --only KIND; a small campaign is --scale 0.001")

    from tools.fuzz import memory, record

    scale = 1.0 if options.scale is None else options.scale
    began = time.perf_counter()
    print(f"{PROCESSES} kinds at a time, a line of each every {EVERY:.0f} s", flush=True)
    tallies = run_all(scale, options.seed)
    print("memory: every path of a call, again and again", flush=True)
    growths = memory.in_a_child(max(1000, int(memory.CALLS * scale)))
    text = record.text(tallies, growths, time.perf_counter() - began)
    print(text)
    if options.write:
        record.write(text)
    bad = any(t.crashes or t.hangs or t.wrong for t in tallies.values())
    return int(bad or any(growth.grew for growth in growths))
