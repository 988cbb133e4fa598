"""Run functions on the ranks of a gloo group. The rank processes are started once per test run."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import multiprocessing.connection
import os
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import debug

SECONDS = 90  # for a call; then the ranks are killed, and the next call starts new ones
_GRACE_SECONDS = 5  # for the other ranks after one has failed
_COLLECTIVE = timedelta(seconds=30)  # for a collective call, so that a rank tells where it waited

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "tests.sharded.models",
        "tests.sharded.ranks",
    ]
)
_pool: list[tuple[Any, Any]] = []  # the process of each rank, and the connection to it


def on_ranks(count: int, own_processes: bool = False) -> Callable[[Any], Any]:
    """Decorate a test to run on each of `count` ranks; it gets its parameters, but no fixtures."""

    def decorate(test: Any) -> Any:
        @functools.wraps(test)
        def run(**parameters: Any) -> None:
            run_on_ranks(count, run, own_processes=own_processes, **parameters)

        return run

    return decorate


def run_on_ranks(
    count: int, function: Any, *args: Any, own_processes: bool = False, **kwargs: Any
) -> list[Any]:
    """Run a function on `count` ranks of a new default group; return the results of all ranks.

    Fails the test with the tracebacks of ranks that raise, or with the names of ranks that do not
    finish. With `own_processes`, ranks are started for this call only: for a function that leaves
    global state.
    """
    pool: list[tuple[Any, Any]] = [] if own_processes else _pool
    failures = ["interrupted"]
    try:
        while len(pool) < count:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(len(pool), there), daemon=True)
            process.start()
            there.close()
            pool.append((process, here))
        with tempfile.TemporaryDirectory() as folder:
            for _, connection in pool[:count]:
                connection.send((folder, count, function, args, kwargs))
            results, failures = _collect([connection for _, connection in pool[:count]])
    finally:
        if failures or own_processes:
            for process, connection in pool:
                process.kill()
                process.join()
                connection.close()
            pool.clear()
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    return results


def _collect(connections: list[Any]) -> tuple[list[Any], list[str]]:
    """Return results and failures, waiting for other ranks only shortly once one has failed."""
    results, failures = [None] * len(connections), []
    running = {connection: rank for rank, connection in enumerate(connections)}
    end = time.monotonic() + SECONDS
    while running:
        ready = multiprocessing.connection.wait(list(running), max(0, end - time.monotonic()))
        if not ready:
            failures += [f"rank {rank} did not finish in time" for rank in running.values()]
            break
        for connection in ready:
            rank = running.pop(connection)
            try:
                error, results[rank] = connection.recv()
            except (EOFError, ConnectionError):
                error = "the process has ended"
            if error:
                failures.append(f"rank {rank}: {error}")
                end = min(end, time.monotonic() + _GRACE_SECONDS)
    return results, failures


def _serve(rank: int, connection: Any) -> None:
    """Run the functions that the test process sends."""
    torch.set_num_threads(1)
    while True:
        folder, count, function, args, kwargs = connection.recv()
        function = getattr(function, "__wrapped__", function)  # what `on_ranks` decorates
        call = functools.partial(function, *args, **kwargs)
        try:
            connection.send(("", _run(rank, count, folder, call)))
        except BaseException:
            connection.send((traceback.format_exc(), None))


def _run(rank: int, count: int, folder: str, call: Callable[[], Any]) -> Any:
    """Call in a new default group, and leave no group behind."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    use_loopback()
    store = dist.FileStore(f"{folder}/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=_COLLECTIVE)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        result = call()
    if dist.is_initialized():
        dist.barrier()  # another rank may still read from this one
        dist.destroy_process_group()
    free_groups()
    return result


def use_loopback() -> None:
    """Make gloo connect the ranks of this machine."""
    loopback = min(
        (name for _, name in socket.if_nameindex()), key=lambda n: not n.startswith("lo")
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME=loopback)


def free_groups() -> None:
    """Free destroyed groups, which the meshes in DTensor's caches keep alive."""
    for name in dir(debug):  # the functions differ between torch's versions
        if name.startswith("_clear_"):
            getattr(debug, name)()
    gc.collect()
