"""Sixty-four ranks exchange their rows in shares; threads of one process stand for them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from paramstats import LocalShard, Summary
from paramstats._core.backend import active
from paramstats._core.layout import Layout
from paramstats._sharded.collectives import Ranks
from paramstats._sharded.exchange import ALL_TO_ALL_FROM, Exchange
from paramstats._sharded.local_rows import LocalRows
from paramstats._sharded.local_shards import LocalShards
from tests import oracle
from tests.sharded.models import statistics

RANKS = 64


class _Threads(Ranks):
    """Ranks that exchange through a list."""

    def __init__(self, rank: int, sent: list[Tensor], barrier: threading.Barrier) -> None:
        super().__init__(None)
        self.size, self.rank, self.global_ranks = RANKS, rank, list(range(RANKS))
        self.calls: list[str] = []
        self._sent, self._barrier = sent, barrier

    def all_gather(self, block: Tensor) -> Tensor:
        self.calls.append("all_gather")
        self._sent[self.rank] = block
        self._barrier.wait()
        received = torch.stack(self._sent)
        self._barrier.wait()
        return received

    def all_to_all(self, blocks: Tensor) -> Tensor:
        received = self.all_gather(blocks)[:, self.rank]
        self.calls[-1] = "all_to_all"
        return received


def test_64_ranks_have_equal_statistics():
    generator = torch.Generator().manual_seed(0)
    whole = {f"w{i}": torch.randn(37 + i, 5, generator=generator) for i in range(9)}
    sent, barrier = [torch.empty(0)] * RANKS, threading.Barrier(RANKS, timeout=60)

    def run(rank: int) -> tuple[Summary, list[str]]:
        shards = {}
        for i, (name, x) in enumerate(whole.items()):
            count = (64, 16, 1)[i % 3]  # the other ranks have replicas
            local = x.view(-1).tensor_split(count)[rank % count]
            shards[name] = LocalShard(local, rank % count, x.numel(), tuple(x.shape))
        tensors = list(shards.values())
        layout = Layout.of(None, tuple(shards), ((),) * len(shards), len(shards), tensors)
        ranks = _Threads(rank, sent, barrier)
        exchange = Exchange(ranks)
        for _ in range(2):
            local = LocalShards(layout, tensors, grads=True)
            record = exchange.run(LocalRows(active(), layout, tensors, local, params=True))
        return Summary(record), ranks.calls

    with ThreadPoolExecutor(RANKS) as threads:
        summaries, calls = zip(*threads.map(run, range(RANKS)), strict=True)
    assert len(set(map(statistics, summaries))) == 1 and ALL_TO_ALL_FROM <= RANKS
    # The first exchange sends headers, agrees and starts again.
    assert calls[0] == ["all_to_all", *["all_to_all", "all_gather"] * 2]
    for name, x in whole.items():
        oracle.check(summaries[0][name], x)
