"""A rank that dies, is absent or does something else: the others get an error in time.

A case is what rank 2 does while ranks 0 and 1 make their calls. The cases run at the same time,
each on three processes of its own, because they mostly wait.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import paramstats
from paramstats._sharded import local_rows
from tests.conftest import run_python
from tests.sharded.ranks import context, use_loopback

TIMEOUT = 3  # seconds, of the group
GRACE = 5  # seconds, until a survivor must have its error

GOOD = "mean 1.0"
LOST = (
    "RuntimeError: paramstats.summarize: expected every rank of the group to make this call, with "
    "the same async_op, and all collective calls in the same order, got: .*"
)
AGAIN = LOST + r"\(since then the ranks may be out of step; use a new process group\)"
TOLD = (
    "RuntimeError: paramstats.summarize: expected every rank to read its tensors, got an error on "
    "rank 2; see the traceback of that rank"
)
RAISED = "MemoryError: on purpose"
REFUSED = (
    "RuntimeError: paramstats.summarize: expected every call in the process group to end, got "
    r"KeyboardInterrupt:  \(since then the ranks may be out of step; use a new process group\)"
)

# The steps of ranks 0 and 1, those of rank 2, and what these steps give. "sync" and "async" are
# calls. "pending" is an asynchronous call whose result is read by "read".
CASES: dict[str, tuple[str, str, list[str], list[str]]] = {
    "sync: killed before": ("sync sync sync", "sync kill", [GOOD, LOST, AGAIN], [GOOD]),
    "async: killed before": ("async async async", "async kill", [GOOD, LOST, AGAIN], [GOOD]),
    "sync: killed during": ("sync sync sync", "sync wait kill", [GOOD, LOST, AGAIN], [GOOD]),
    "async: killed during": ("async async async", "async wait kill", [GOOD, LOST, AGAIN], [GOOD]),
    "sync: absent": ("sync sync sync", "sync leave", [GOOD, LOST, AGAIN], [GOOD]),
    "async: absent": ("async async async", "async leave", [GOOD, LOST, AGAIN], [GOOD]),
    "async: never there": ("async async", "leave", [AGAIN, AGAIN], []),
    "sync: too late": ("sync sync", "late sync sync", [LOST, AGAIN], [LOST, AGAIN]),
    "async: too late": (
        "async async async", "async late async async", [GOOD, LOST, AGAIN], [GOOD, LOST, AGAIN],
    ),
    "async and sync": ("async async", "sync sync", [AGAIN, AGAIN], [LOST, AGAIN]),
    "sync and async": (
        "async sync sync", "async async async", [GOOD, LOST, AGAIN], [GOOD, LOST, AGAIN],
    ),
    "destroyed": ("async async async", "async destroy leave", [GOOD, LOST, AGAIN], [GOOD]),
    "sync: interrupted": (
        "sync sync sync", "interrupt-sync sync leave", [LOST, AGAIN, AGAIN],
        ["KeyboardInterrupt: ", REFUSED],
    ),
    "async: interrupted": (
        "async async async", "async interrupt-async async leave", [GOOD, LOST, AGAIN],
        [GOOD, "KeyboardInterrupt: ", REFUSED],
    ),
    "no fault": (
        "sync async sync async sync async pending pending destroy read read",
        "wait sync async fail-sync fail-async sync async pending wait pending destroy read read",
        [GOOD, GOOD, TOLD, TOLD, *[GOOD] * 4],
        [GOOD, GOOD, RAISED, RAISED, *[GOOD] * 4],
    ),
}  # fmt: skip


class Interrupted(dict[str, Any]):
    """A mapping that Ctrl-C interrupts while it is listed."""

    def items(self) -> Any:
        raise KeyboardInterrupt


def _serve(case: str, rank: int, folder: Path) -> None:
    """Do the steps of a rank; write what each call gives and how long it took."""
    torch.set_num_threads(1)
    use_loopback()
    store = dist.FileStore(str(folder / "store"), 3)
    store.set(f"started {rank}", "")  # it may take longer than the timeout
    store.wait([f"started {rank}" for rank in range(3)], timedelta(seconds=60))
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=timeout)
    source = {"w": paramstats.LocalShard(torch.full((4,), float(rank)), rank, 12)}
    pending: list[paramstats.Summary] = []
    fails = mock.patch.object(local_rows, "read_rows", side_effect=MemoryError("on purpose"))
    for step in CASES[case][rank == 2].split():
        begin = time.monotonic()
        try:
            match step:
                case "sync" | "async":
                    mean = paramstats.summarize(source, async_op=step == "async")["w"].mean
                case "fail-sync" | "fail-async":
                    with fails:
                        summary = paramstats.summarize(source, async_op=step == "fail-async")
                    mean = summary["w"].mean
                case "interrupt-sync" | "interrupt-async":
                    paramstats.summarize(Interrupted(source), async_op=step == "interrupt-async")
                case "pending":
                    pending.append(paramstats.summarize(source, async_op=True))
                    continue
                case "read":
                    mean = pending.pop(0)["w"].mean
                case "destroy":
                    dist.destroy_process_group()
                    continue
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "wait" | "late" | "leave":
                    time.sleep({"wait": 1, "late": TIMEOUT + 1, "leave": 600}[step])
                    continue
            outcome = f"mean {mean}"
        except (Exception, KeyboardInterrupt) as error:
            outcome = f"{type(error).__name__}: {error}"
        with (folder / str(rank)).open("a") as file:
            print(json.dumps((outcome, time.monotonic() - begin)), file=file)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Any]]]:
    """Run all cases; return what each call gave and its seconds, by case and rank."""
    folders = {case: tmp_path_factory.mktemp("case") for case in CASES}
    processes = {
        (case, rank): context.Process(target=_serve, args=(case, rank, folder), daemon=True)
        for case, folder in folders.items()
        for rank in range(3)
    }
    for process in processes.values():
        process.start()
    end = time.monotonic() + 90
    for (case, rank), process in processes.items():
        if rank < 2 or not CASES[case][1].endswith("leave"):
            process.join(max(0, end - time.monotonic()))
    for process in processes.values():
        process.kill()
        process.join()
    return {
        case: [
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            for path in (folder / str(rank) for rank in range(3))
        ]
        for case, folder in folders.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_every_rank_has_a_result_or_an_error_in_time(case, outcomes):
    *_, survivors, other = CASES[case]
    for got, expected in zip(outcomes[case], (survivors, survivors, other), strict=True):
        assert len(got) == len(expected), got
        for (outcome, seconds), pattern in zip(got, expected, strict=True):
            assert re.fullmatch(pattern, outcome, re.DOTALL)
            assert seconds < TIMEOUT + GRACE


_EXITS = """
import datetime, os, sys, time, torch, paramstats, torch.distributed as dist

def run(rank):
    store, timeout = dist.FileStore(sys.argv[1], 4), datetime.timedelta(seconds=600)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=timeout)
    source = {"w": paramstats.LocalShard(torch.ones(4), rank, 16)}
    paramstats.summarize(source, async_op=True).wait()
    if rank == 3:
        time.sleep(600)
    pending = [paramstats.summarize(source, async_op=True) for _ in range(3)]
    time.sleep(0.2)
    if rank == 1:
        sys.exit(7)
    if rank == 2:
        dist.destroy_process_group()
        raise ValueError("on purpose")

ranks = []
for rank in range(4):
    process = os.fork()
    if process == 0:
        run(rank)
        sys.exit()
    ranks.append(process)
print([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks[:3]])
os.kill(ranks[3], 9)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forks, which start fast")
def test_pending_exchange_does_not_hold_up_the_exit(tmp_path):
    use_loopback()
    done = run_python("-c", _EXITS, str(tmp_path / "store"))
    assert done.stdout == "[0, 7, 1]\n" and done.stderr.count("ValueError: on purpose") == 1
    assert "terminate called" not in done.stderr and "Fatal" not in done.stderr
