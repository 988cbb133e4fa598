"""Other processes, threads and signals: where a call is made, rather than of what."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_convert

import paramstats
from paramstats._core import backend as backends
from tools.matrix.looking import Look, check
from tools.matrix.rows import NotRunError, row

LARGE = 600_000
"""Elements: more than a call reads on the calling thread alone."""

SECONDS = 120
"""What hangs is a failure."""


def large(seed: int) -> torch.Tensor:
    return torch.randn(LARGE, generator=torch.Generator().manual_seed(seed))


class Summaries(Dataset):
    """Items are summaries that a worker makes of the tensor of that number."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> paramstats.Summary:
        tensor = large(index)
        return paramstats.summarize({"x": tensor, "z": torch.view_as_complex(tensor.view(-1, 2))})


def as_it_is(items: list[Any]) -> Any:
    return items[0]


class Prepared:
    """Gives a worker the backend, and threads if more than its one are wanted."""

    def __init__(self, backend: str, threads: int | None) -> None:
        self.backend, self.threads = backend, threads

    def __call__(self, _: int) -> None:
        backends._active = backends.choose(self.backend)
        if self.threads:
            torch.set_num_threads(self.threads)


def in_workers(look: Look, method: str, threads: int | None = None) -> None:
    if method not in multiprocessing.get_all_start_methods():
        raise NotRunError(f"no {method} on this system")

    def compare() -> int:
        paramstats.summarize({"x": large(0)})  # the threads are there when workers are made
        large(0).sum()
        prepare = Prepared(backends.active().name, threads)
        loader = DataLoader(
            Summaries(), batch_size=1, num_workers=2, collate_fn=as_it_is, timeout=SECONDS,
            worker_init_fn=prepare, multiprocessing_context=method,
        )  # fmt: skip
        compared = 0
        for index, summary in enumerate(loader):
            check(summary["x"], large(index))
            assert abs(summary["z"].norm - summary["x"].norm) <= 1e-6 * summary["x"].norm
            compared += 2
        return compared

    look.each(compare)


@row("DataLoader workers by fork", quick=True)
def fork_workers(look: Look) -> str:
    in_workers(look, "fork")
    in_workers(look, "fork", threads=2)
    summary = paramstats.summarize({"x": large(0)})
    assert type(default_convert(summary)) is dict
    return (
        "also in workers that called `torch.set_num_threads(2)`; with `batch_size=None` torch's "
        "`default_convert` makes a plain dict of a `Summary`: return its `.to_dict()` or "
        "`.scalars()`"
    )


@row("DataLoader workers by spawn")
def spawn_workers(look: Look) -> None:
    in_workers(look, "spawn")


@row("DataLoader workers by forkserver")
def forkserver_workers(look: Look) -> None:
    in_workers(look, "forkserver")


@row("`os.fork()` after torch's threads were at work", quick=True)
def forked(look: Look) -> str:
    if not hasattr(os, "fork"):
        raise NotRunError("no fork on this system")

    def compare() -> int:
        tensor = large(0)
        tensor.sum()
        expected = paramstats.summarize({"x": tensor})["x"]
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            statistics = paramstats.summarize({"x": tensor})["x"]
            os._exit(int(abs(statistics.norm - expected.norm) > 1e-6 * expected.norm))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child hung or differs"
        check(paramstats.summarize({"x": tensor})["x"], tensor)
        return 1

    look.each(compare)
    return "on the calling thread there: torch's own operators would hang"


def hogwild(model: torch.nn.Module, backend: str) -> None:
    backends._active = backends.choose(backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 64)).square().mean().backward()
        assert paramstats.summarize(model).total.grad.norm > 0
        optimizer.step()


@row("Hogwild: processes that train one model in shared memory")
def shared_memory(look: Look) -> None:
    import torch.multiprocessing as mp

    def compare() -> int:
        model = torch.nn.Linear(64, 32).share_memory()
        mp.spawn(_hogwild_process, (model, backends.active().name), nprocs=2)
        check(paramstats.summarize(model)["weight"], model.weight)
        return 1

    look.each(compare)


def _hogwild_process(_: int, model: torch.nn.Module, backend: str) -> None:
    hogwild(model, backend)


@row("Threads that summarise one model at once, while another trains it", quick=True)
def threads(look: Look) -> str:
    def compare() -> int:
        model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(8)))
        done = threading.Event()
        errors: list[BaseException] = []

        def watch() -> None:
            try:
                while not done.is_set():
                    assert paramstats.summarize(model).total.count == 8 * (256 * 256 + 256)
            except BaseException as error:
                errors.append(error)

        watchers = [threading.Thread(target=watch) for _ in range(3)]
        for watcher in watchers:
            watcher.start()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        try:
            for _ in range(15):
                optimizer.zero_grad(set_to_none=False)  # torch itself crashes with True
                model(torch.randn(8, 256)).square().mean().backward()
                optimizer.step()
        finally:
            done.set()
            for watcher in watchers:
                watcher.join(SECONDS)
        assert not errors, errors[0]
        check(paramstats.summarize(model)["0.weight"], model[0].weight)
        return 1

    look.each(compare)
    return (
        "with `zero_grad(set_to_none=False)`: while one thread drops gradients no other may look "
        "at `.grad`, torch itself crashes then"
    )


@row("A signal handler that summarises, in the midst of calls", quick=True)
def handler(look: Look) -> None:
    def compare() -> int:
        model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(20)))
        expected = paramstats.summarize(model)
        from_handler: list[bool] = []

        def summarise(*_: Any) -> None:
            from_handler.append(paramstats.summarize(model) == expected)
            signal.setitimer(signal.ITIMER_REAL, 0.001)  # the next one, not within this one

        before = signal.signal(signal.SIGALRM, summarise)
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        try:
            end = time.perf_counter() + SECONDS
            while len(from_handler) < 50 and time.perf_counter() < end:
                assert paramstats.summarize(model) == expected
                model[3].bias = torch.nn.Parameter(model[3].bias.detach())  # walked anew
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert len(from_handler) >= 50 and all(from_handler)
        check(paramstats.summarize(model)["0.weight"], model[0].weight)
        return 1

    look.each(compare)


INTERRUPTED = """
import sys, torch, paramstats
from paramstats._core import backend as backend
backend._active = backend.choose(sys.argv[1])
tensors = {str(i): torch.randn(1_500_000) for i in range(8)}
tensors["z"] = torch.randn(50_000, dtype=torch.cfloat)
expected = {name: stats.norm for name, stats in paramstats.summarize(tensors).items()}
for _ in range(int(sys.argv[2])):
    try:
        print("begun", flush=True)
        while True:
            paramstats.summarize(tensors)
    except KeyboardInterrupt:
        pass
    again = {name: stats.norm for name, stats in paramstats.summarize(tensors).items()}
    assert again == expected, "the next call gives other statistics"
    print("interrupted", flush=True)
print("begun", flush=True)
while True:
    paramstats.summarize(tensors)
"""


@row("Ctrl-C during calls on a large model, again and again")
def interrupted(look: Look) -> str:
    times = 20

    def compare() -> int:
        name = backends.active().name
        child = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED, name, str(times)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        watchdog = threading.Timer(SECONDS, child.kill)
        watchdog.start()
        delays = random.Random(0)
        try:
            for _ in range(times):
                assert child.stdout.readline() == "begun\n", child.stderr.read()
                time.sleep(delays.uniform(0, 0.05))
                child.send_signal(signal.SIGINT)
                assert child.stdout.readline() == "interrupted\n", child.stderr.read()
            assert child.stdout.readline() == "begun\n"
            time.sleep(0.05)
            child.send_signal(signal.SIGINT)
            _, complaints = child.communicate()
        finally:
            watchdog.cancel()
            child.kill()
            child.wait()
        assert child.returncode == -signal.SIGINT, f"ended with {child.returncode}"
        lines = complaints.strip().splitlines()
        assert lines[0].startswith("Traceback") and lines[-1] == "KeyboardInterrupt", complaints
        assert complaints.count("Traceback") == 1, complaints
        return times

    look.each(compare)
    return (
        f"12 million elements: {2 * times} times KeyboardInterrupt came out of the call, and the "
        "next call was right; where nobody catches it, Python ends with its usual traceback"
    )
