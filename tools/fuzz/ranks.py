"""Ranks that make random calls, while one of them fails at a random moment.

The last rank is killed, stopped, interrupted or too late. Every call of the others must end in
time, with an error or with the statistics of its own step on all ranks.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import paramstats
from tests.sharded.ranks import use_loopback

RANKS = 3
STEPS = 60
TIMEOUT = 1  # seconds, of the group
GRACE = 5  # seconds until a survivor must have its error
FAULTS = ("none", "kill", "terminate", "stop", "interrupt", "late")


def run(seed: int) -> int:
    """Run one case; return the number of steps of the ranks that do not fail."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [_fork(rank, seed, folder) for rank in range(RANKS)]
        end = time.monotonic() + 90
        running = set(ranks[:-1])
        while running and time.monotonic() < end:
            running = {rank for rank in running if os.waitpid(rank, os.WNOHANG) == (0, 0)}
            time.sleep(0.01)
        for rank in [*running, ranks[-1]]:
            os.kill(rank, signal.SIGKILL)
            os.waitpid(rank, 0)
        reports = [(folder / str(rank)).read_text().splitlines() for rank in range(RANKS - 1)]
    wrong = [line for report in reports for line in report if line != "done"]
    assert not running and not wrong, f"{len(running)} ranks hang; {wrong}"
    assert all(report == ["done"] * STEPS for report in reports), "a rank has ended"
    return STEPS * (RANKS - 1)


def _fork(rank: int, seed: int, folder: Path) -> int:
    process = os.fork()
    if process == 0:
        try:
            _serve(rank, seed, folder)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    return process


def _serve(rank: int, seed: int, folder: Path) -> None:
    """Make the calls of one rank; write "done" after each, or what is wrong."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    use_loopback()
    store = dist.FileStore(str(folder / "store"), RANKS)
    store.set(f"started {rank}", "")
    store.wait([f"started {rank}" for rank in range(RANKS)], timedelta(seconds=60))
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timeout)
    choices = random.Random(seed)  # equal on all ranks
    fault, moment = choices.choice(FAULTS), choices.uniform(0.001, 0.3)
    if rank == RANKS - 1:
        _fail_later(fault, moment)
    pending: list[tuple[int, paramstats.Summary]] = []
    with (folder / str(rank)).open("w", buffering=1) as report:
        for step in range(STEPS):
            async_op, reads = choices.random() < 0.5, choices.random() < 0.5
            source = {
                f"w{i}": paramstats.LocalShard(
                    torch.full((2,), float(step + rank)), rank, 2 * RANKS
                )
                for i in range(choices.randint(1, 3))
            }
            result, begin = "done", time.monotonic()
            try:
                pending.append((step, paramstats.summarize(source, async_op=async_op)))
                while pending and (reads or not async_op):
                    expected, summary = pending.pop()
                    if (mean := summary["w0"].mean) != expected + (RANKS - 1) / 2:
                        result = f"{fault}: step {expected} has mean {mean}"
            except RuntimeError as error:
                if fault == "none":
                    result = f"step {step}: {error}"
            except KeyboardInterrupt:
                pass
            if time.monotonic() - begin > TIMEOUT + GRACE:
                result = f"{fault}: step {step} took {time.monotonic() - begin:.1f} s"
            print(result, file=report)


def _fail_later(fault: str, moment: float) -> None:
    """Let this process fail after `moment` seconds."""
    signals = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "stop": signal.SIGSTOP}
    if fault in signals:
        threading.Timer(moment, os.kill, (os.getpid(), signals[fault])).start()
    elif fault == "interrupt":
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, moment)
    elif fault == "late":
        signal.signal(signal.SIGALRM, lambda *_: time.sleep(TIMEOUT + 1))
        signal.setitimer(signal.ITIMER_REAL, moment)
