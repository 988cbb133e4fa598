"""Sixty-four ranks as threads of one process: rows go out by all_to_all, joined ones come back."""

from __future__ import annotations

import contextlib
import threading

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import paramstats
from paramstats._summary import record_of
from tests import oracle

RANKS = 64
SECONDS = 60


def as_threads(ranks: int, function) -> list:
    """What `function()` returns in each of `ranks` threads with process groups of their own."""
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    results, errors = [None] * ranks, []
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    store = dist.HashStore()

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=ranks, store=store)
            results[rank] = function()
        except BaseException as error:
            errors.append(error)
            threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            with contextlib.suppress(AttributeError):  # torch 2.11 lacks a part of this world
                dist.destroy_process_group()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
            assert not thread.is_alive(), f"a rank did not end within {SECONDS} s"
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    if errors:
        raise errors[0]
    return results


def _summarized() -> bytes:
    mesh = init_device_mesh("cpu", (RANKS // 4, 4))
    generator = torch.Generator().manual_seed(0)
    values = {f"w{i}": torch.randn(37 + i, 5, generator=generator) for i in range(9)}
    placements = [[Shard(0), Replicate()], [Shard(0), Shard(1)], [Replicate(), Shard(0)]]
    source = {
        name: distribute_tensor(x, mesh, placements[i % 3], src_data_rank=None)
        for i, (name, x) in enumerate(values.items())
    }
    first = paramstats.summarize(source)
    summary = paramstats.summarize(source)
    assert summary == first and not summary.diverged
    for name, x in values.items():
        oracle.check(summary[name], x)
    return record_of(summary).table


def test_sixty_four_ranks():
    results = as_threads(RANKS, _summarized)
    assert len(results) == RANKS and len(set(results)) == 1
