"""Exchanges in the background: same results, nothing waits for them, nothing stays."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
import threading
import time
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial

import paramstats
from paramstats._core.layout import Layout
from paramstats._core.record import Record
from paramstats._sharded import exchange
from paramstats._sharded.background import DeferredExchange
from tests.sharded.models import Transformer, backward, messages_of, sharded, statistics
from tests.sharded.ranks import on_ranks
from tools.fuzz.histories import at_opcode


@on_ranks(2)
def test_background_exchange_returns_the_statistics_at_the_time_of_the_call():
    model = fully_shard(Transformer(), mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected, deferred = [], []
    for _ in range(5):
        optimizer.zero_grad()
        backward(model)
        expected.append(paramstats.summarize(model))
        deferred.append(paramstats.summarize(model, async_op=True))
        optimizer.step()
    for got, now in zip(deferred, expected, strict=True):
        assert got.wait() is got and got.ready()
        assert statistics(got) == statistics(now) and got == now
        assert repr(got.scalars()) == repr(now.scalars())
    last = paramstats.summarize(model, async_op=True)
    while not last.ready():
        time.sleep(0.001)
    # An error is raised when a statistic is read.
    p = nn.Parameter(sharded(torch.ones(4)))
    grad = sharded(torch.ones(4))
    p.grad = grad if dist.get_rank() == 0 else None
    broken = paramstats.summarize({"p": p}, async_op=True)
    assert "got 2" in "".join(messages_of(broken.wait))
    # Several calls may follow a change before the first of them has ended.
    next(iter(model.parameters())).requires_grad_(False)
    several = [paramstats.summarize(model, async_op=True) for _ in range(3)]
    assert all(s["norm.weight"].count == 8 for s in several)
    assert not several[0]["embedding.weight"].requires_grad
    paramstats.summarize(model, async_op=True)  # the result is dropped
    assert paramstats.summarize(model, async_op=True).total.count


@pytest.mark.parametrize("shares", [False, True])
@on_ranks(3)
def test_background_exchange_makes_the_same_collective_calls(shares):
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (3,))
    partial = DTensor.from_local(torch.full((4,), float(rank)), mesh, [Partial()])
    source = {f"stage{rank}": torch.ones(3 + rank), "partial": partial, "all": torch.ones(2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "ALL_TO_ALL_FROM", 2 if shares else 17)
        got = paramstats.summarize(source, async_op=True).wait()
        assert got == paramstats.summarize(source)
    assert list(got) == ["stage0", "partial", "all", "stage1", "stage2"]
    assert got["partial"].mean == 3.0 and got["stage2"].count == 5


@on_ranks(2)
def test_what_does_not_wait_for_a_background_exchange():
    source = {"w": sharded(torch.arange(4.0))}
    if dist.get_rank() == 0:
        pending = paramstats.summarize(source, async_op=True)  # connects
        dist.barrier()
        pending = paramstats.summarize(source, async_op=True)
        assert not pending.ready() and not pending.is_local
        assert repr(pending) == "<Summary that is not ready>"
        dist.barrier()
    else:
        paramstats.summarize(source, async_op=True)
        dist.barrier()
        dist.barrier()
        pending = paramstats.summarize(source, async_op=True)
    assert pending["w"].mean == 1.5 and repr(pending) == "<Summary of 1 tensors, 0 with gradients>"
    del source["w"]
    failed = paramstats.summarize({"w": torch.ones(dist.get_rank())}, group=dist.group.WORLD,
                                  async_op=True)  # fmt: skip
    while not failed.ready():
        time.sleep(0.001)
    assert repr(failed).startswith("<Summary that failed: paramstats.summarize: expected one shape")


def test_a_signal_handler_may_wait_for_the_exchange_that_is_waited_for():
    """The handler comes before each operation that the interrupted call executes."""

    def stop(*_: object) -> None:
        raise AssertionError("the handler waits forever")

    def run_later(pending: DeferredExchange) -> None:
        time.sleep(0.002)
        pending.run()

    record = Record(Layout((), (), 0, (), (), (), ()), b"")
    ran: Any = types.SimpleNamespace(run=lambda *_: record)
    alive: Any = types.SimpleNamespace(is_alive=lambda: True)
    options: Any = types.SimpleNamespace(correction=1.0, grad_scale=1.0)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    try:
        reached, opcode = True, 0
        while reached:
            opcode += 1
            pending = DeferredExchange(alive, ran, None, (), options)  # type: ignore[arg-type]
            worker = threading.Thread(target=run_later, args=(pending,))
            worker.start()
            reached = at_opcode(opcode, pending.result, pending.result)
            worker.join()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert opcode > 20


def _resources() -> tuple[set[str], int, int]:
    gc.collect()
    threads = {thread.name for thread in threading.enumerate()}
    return threads, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
@on_ranks(2, own_processes=True)
def test_groups_that_come_and_go_leave_nothing_behind():
    source, resources = {"w": torch.ones(3)}, []
    for _ in range(6):
        group = dist.new_group()
        for async_op in (False, True, True):
            assert paramstats.summarize(source, group=group, async_op=async_op)["w"].count == 3
        dist.barrier()
        dist.destroy_process_group(group)
        del group
        end = time.monotonic() + 20
        while (now := _resources()) not in resources and time.monotonic() < end and resources:
            time.sleep(0.01)  # the thread ends after the group
        resources.append(now)
    assert resources[-1] in resources[:2]


@on_ranks(3)
def test_watch_appends_every_summary_to_the_history():
    model = fully_shard(Transformer(), mesh=init_device_mesh("cpu", (3,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = {}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/history.jsonl"
        history = paramstats.History(path if dist.get_rank() == 0 else None)
        with paramstats.watch(model, history=history, every=1, async_op=True) as watcher:
            for step in range(12):
                optimizer.zero_grad()
                backward(model)
                expected[step] = statistics(paramstats.summarize(model))
                if step and dist.get_rank() > 0:  # the first step connects the ranks
                    dist.barrier()
                watcher.step()  # on rank 0, it does not wait for the other ranks
                if step and dist.get_rank() == 0:
                    dist.barrier()
                optimizer.step()
        history.close()
        if dist.get_rank() == 0:
            for got in (history, paramstats.History.load(path)):
                assert {step: statistics(summary) for step, summary in got} == expected
                assert [step for step, _ in got] == list(range(12))
        else:
            assert watcher.summary.ready() and len(history) == 0
