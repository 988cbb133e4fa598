"""Runs a function in several processes of one gloo group, which cannot hang a test."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

SECONDS = 90
"""After which processes are killed and the test has failed; a group's own patience is shorter."""

GROUP_SECONDS = 30

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.sharded.preloaded"])


def together(processes: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns in each process, in order of rank.

    Fails the test with the processes' own tracebacks, or with their names if they do not end.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, started = [], []
        for rank in range(processes):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_in_process, args=(theirs, folder, rank, processes, function, args)
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            started.append(process)
        results, failures = _collect(pipes)
        for process in started:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    return results


def _collect(pipes: list[Any]) -> tuple[list[Any], list[str]]:
    end = time.monotonic() + SECONDS
    results, failures = [], []
    for rank, pipe in enumerate(pipes):
        try:
            if not pipe.poll(max(0.1, end - time.monotonic())):
                failures.append(f"rank {rank} did not end within {SECONDS} s")
                continue
            trouble, result = pipe.recv()
        except EOFError:
            trouble, result = "ended without a word", None
        if trouble:
            failures.append(f"rank {rank}: {trouble}")
        results.append(result)
    return results, failures


def _in_process(
    pipe: Any, folder: str, rank: int, processes: int, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME=_loopback())
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(Path(folder) / "store"), processes),
            rank=rank,
            world_size=processes,
            timeout=timedelta(seconds=GROUP_SECONDS),
        )
        torch.manual_seed(0)
        message = ("", function(*args))
    except BaseException:
        message = (traceback.format_exc(), None)
    pipe.send(message)
    if not message[0] and dist.is_initialized():
        dist.barrier()  # nobody goes while another may still read from it
        dist.destroy_process_group()


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name.startswith("lo")), names[0])
