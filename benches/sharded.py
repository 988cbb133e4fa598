"""Measures what the exchange of statistics between ranks costs, for 8 to 4,096 ranks.

    python -m benches.sharded [TENSORS]

First, real processes on this machine summarize a model of DTensors. For more ranks, one process
runs the exchange of rank 0, and its own data replaces what the other ranks would send. So the
number of collectives, the bytes and the work of a rank are measured; the time of the network is
computed from an assumed bandwidth and latency.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.spawn import spawn

import paramstats
from benches import hardware
from docs import blocks
from paramstats._core.backend import active
from paramstats._core.layout import Layout
from paramstats._sharded.collectives import Processes
from paramstats._sharded.exchange import ALL_TO_ALL_FROM, Group
from paramstats._sharded.offer import Offer
from paramstats._sharded.pieces import held

_PROCESSES = 4
_RANKS = (8, 16, 64, 256, 1024, 4096)
_ELEMENTS = 16
_REPEAT = 15
_LATENCY = 20e-6
"""Assumed seconds per collective."""
_BYTES_PER_SECOND = 10e9
"""Assumed bandwidth of a rank: a tenth of its share if 8 GPUs share 8 x 400 Gbit/s."""


# ---- real processes -----------------------------------------------------------------------------


def real_seconds(processes: int, tensors: int) -> tuple[float, float]:
    """Return the seconds of a call with the exchange, and of one without it (local=True)."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_measure_rank, (processes, tensors, folder), nprocs=processes)
        whole, local = json.loads((Path(folder) / "seconds").read_text())
    return whole, local


def _measure_rank(rank: int, processes: int, tensors: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))

    def sharded() -> DTensor:
        return DTensor.from_local(torch.randn(4, _ELEMENTS // 4), mesh, [Shard(0)])

    model = nn.ParameterList(nn.Parameter(sharded()) for _ in range(tensors // 2))
    for p in model:
        p.grad = sharded()
    medians = [
        _median_seconds(lambda: paramstats.summarize(model), before=dist.barrier),
        _median_seconds(lambda: paramstats.summarize(model, local=True), before=dist.barrier),
    ]
    if rank == 0:
        (Path(folder) / "seconds").write_text(json.dumps(medians))
    dist.barrier()
    dist.destroy_process_group()


def _median_seconds(call: Callable[[], object], before: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEAT):
        before()
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


# ---- many ranks, simulated by one process -------------------------------------------------------


class SimulatedRanks(Processes):
    """Answers collectives as if the other ranks held the next shards, with the same statistics."""

    def __init__(self, ranks: int) -> None:
        super().__init__(None)
        self.size = ranks
        self.ranks = list(range(ranks))
        self.collectives = 0
        self.received = 0
        self.seconds = 0.0

    def all_gather(self, block: Tensor) -> Tensor:
        # From ALL_TO_ALL_FROM ranks on, gathered rows are merged ones, which have no index.
        return self._answer(block[None], self.size < ALL_TO_ALL_FROM)

    def all_to_all(self, blocks: Tensor) -> Tensor:
        return self._answer(blocks[:1], True)

    def _answer(self, block: Tensor, has_indices: bool) -> Tensor:
        begin = time.perf_counter()
        out = block.repeat(self.size, 1, 1)
        if has_indices:
            indices = out[:, 1:, 0]
            indices += torch.arange(self.size)[:, None] * (indices >= 0)
        self.collectives += 1
        self.received += (self.size - 1) * out[0].nbytes
        self.seconds += time.perf_counter() - begin
        return out


class Cost(NamedTuple):
    """The cost of one exchange for one rank."""

    collectives: int
    received: int
    work_s: float
    network_s: float


def simulated_cost(tensors: int, ranks: int) -> Cost:
    """Measure the exchange of half as many parameters as `tensors`, and their gradients."""
    parameters = {}
    for i in range(tensors // 2):
        p = nn.Parameter(torch.randn(_ELEMENTS))
        p.grad = torch.randn(_ELEMENTS)
        parameters[f"layers.{i}.weight"] = paramstats.LocalShard(p, 0, _ELEMENTS * ranks)
    shards, names = list(parameters.values()), tuple(parameters)
    layout = Layout.of(None, names, ((),) * len(names), len(names), shards)
    offer = Offer(active(), layout, shards, held(shards, True, {}), True)
    simulated = SimulatedRanks(ranks)
    group = Group(simulated)
    group.exchange(offer)  # the first exchange also agrees on the names
    seconds = []
    for _ in range(_REPEAT):
        simulated.collectives, simulated.received, simulated.seconds = 0, 0, 0.0
        begin = time.perf_counter()
        group.exchange(offer)
        seconds.append(time.perf_counter() - begin - simulated.seconds)
    network = simulated.collectives * _LATENCY + simulated.received / _BYTES_PER_SECOND
    return Cost(simulated.collectives, simulated.received, statistics.median(seconds), network)


def main() -> None:
    tensors = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    print(hardware.describe("cpu"))
    whole, local = (1e3 * s for s in real_seconds(_PROCESSES, tensors))
    print(f"{tensors:,} tensors (half of them gradients), {_PROCESSES} processes with gloo:")
    print(f"{whole:.1f} ms per call, {local:.1f} ms with local=True (no exchange)")
    rows = []
    for ranks in _RANKS:
        cost = simulated_cost(tensors, ranks)
        received = f"{cost.received / 1e6:.2f} MB"
        times = f"{cost.work_s * 1e3:.1f} ms", f"{cost.network_s * 1e3:.2f} ms"
        rows.append((f"{ranks:,}", str(cost.collectives), received, *times))
    head = ("ranks", "collectives", "received per rank", "work (measured)", "network (computed)")
    print(blocks.table(head, rows, right=range(len(head))))


if __name__ == "__main__":
    main()
