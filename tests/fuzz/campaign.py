"""The campaign: all kinds of cases in child processes, so that a crash has a number.

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
from collections.abc import Sequence
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
_SEED = struct.Struct("=q")


@dataclasses.dataclass
class Tally:
    """What came of one kind."""

    executions: int = 0
    crashes: int = 0
    hangs: int = 0
    wrong: int = 0
    seconds: float = 0.0


def run_here(
    kind: str, seed: int, count: int, progress: Path | None = None
) -> tuple[int, int, int]:
    """Cases from `seed` on until `count` executions are done; prints what is wrong.

    Returns executions, wrong cases, and the next seed.
    """
    module = importlib.import_module(f"tests.fuzz.{kind}")
    shown = _shown(progress)
    gc.freeze()  # collections, of which some cases make many, need not look at torch
    executions = wrong = 0
    while executions < count:
        if shown is not None:
            shown[: _SEED.size] = _SEED.pack(seed)
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
        return mmap.mmap(file.fileno(), _SEED.size)


def run_kind(kind: str, seed: int, count: int, timeout: float = TIMEOUT) -> Tally:
    """The same in children, one after the other."""
    tally = Tally()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "seed"
        while tally.executions < count:
            progress.write_bytes(_SEED.pack(seed))
            batch = min(BATCH, count - tally.executions)
            output, hung = _child(kind, seed, batch, progress, timeout)
            try:
                result = json.loads(output.splitlines()[-1])
                executions, wrong, seed = result["done"]
            except (ValueError, IndexError, KeyError, TypeError):
                (last,) = _SEED.unpack(progress.read_bytes())
                print(f"{kind}, seed {last}: {'hung' if hung else 'crashed'}")
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


def _child(kind: str, seed: int, count: int, progress: Path, timeout: float) -> tuple[str, bool]:
    """What a child printed, and whether it had to be ended."""
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.fuzz", "--only", kind]
    command += ["--seed", str(seed), "--count", str(count), "--progress", str(progress)]
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
        return output.read(), hung


def _print_findings(output: str) -> None:
    lines = output.splitlines()[:-1]
    if lines:
        print("\n".join(lines), flush=True)


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
            print(kind, dataclasses.asdict(tallies[kind]), flush=True)

    workers = [threading.Thread(target=work) for _ in range(PROCESSES)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {kind: tallies[kind] for kind in SHARES}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--only", help=f"one kind, in this process: {', '.join(SHARES)}")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--count", type=int, default=1, help="executions, with --only")
    parser.add_argument("--progress", type=Path, help="a file for the seed of the case that runs")
    parser.add_argument("--scale", type=float, default=1.0, help="of the campaign")
    parser.add_argument("--write", action="store_true", help="the result into docs/robustness.md")
    options = parser.parse_args(arguments)
    if options.only:
        done = run_here(options.only, options.seed, options.count, options.progress)
        print(json.dumps({"done": done}))
        return int(done[1] > 0)

    from tests.fuzz import memory, record

    began = time.perf_counter()
    tallies = run_all(options.scale, options.seed)
    growths = memory.in_a_child(max(1000, int(memory.CALLS * options.scale)))
    text = record.text(tallies, growths, time.perf_counter() - began)
    print(text)
    if options.write:
        record.write(text)
    bad = any(t.crashes or t.hangs or t.wrong for t in tallies.values())
    return int(bad or any(growth.grew for growth in growths))
