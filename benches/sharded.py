"""Measures what the exchange of statistics between ranks costs, for 8 to 4,096 ranks.

    python -m benches.sharded [TENSORS]

First, real processes on this machine summarize a model of DTensors. For more ranks, one process is
rank 0, and its own data replaces what the other ranks would send. So the number of collectives, the
bytes and the work of a rank are measured; the time of the network is computed from an assumed
bandwidth and latency.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.spawn import spawn
from torch.testing._internal.distributed.fake_pg import FakeStore

import paramstats
from benches import hardware
from docs import blocks

_PROCESSES = 4
_RANKS = (8, 16, 64, 256, 1024, 4096)
_ELEMENTS = 16
_REPEAT = 15
_LATENCY = 20e-6
"""Assumed seconds per collective."""
_BYTES_PER_SECOND = 10e9
"""Assumed bandwidth of a rank: a tenth of its share if 8 GPUs share 8 x 400 Gbit/s."""


# ---- real processes -----------------------------------------------------------------------------


def real_seconds(processes: int, tensors: int) -> float:
    """Return the seconds of a call in one of several processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_measure_rank, (processes, tensors, folder), nprocs=processes)
        return float((Path(folder) / "seconds").read_text())


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
    seconds = []
    for _ in range(_REPEAT):
        dist.barrier()
        seconds.append(_seconds(model))
    if rank == 0:
        (Path(folder) / "seconds").write_text(str(statistics.median(seconds)))
    dist.barrier()
    dist.destroy_process_group()


def _seconds(source: Any, clock: Callable[[], float] = time.perf_counter) -> float:
    begin = clock()
    paramstats.summarize(source)
    return clock() - begin


# ---- many ranks, simulated by one process -------------------------------------------------------

_CPU = time.thread_time
"""Other programs on the machine do not change the CPU time of a thread."""


class SimulatedRanks:
    """Replaces torch's collectives: the other ranks hold the next shards, with equal statistics."""

    def __init__(self) -> None:
        self.collectives = 0
        self.received = 0
        self.seconds = 0.0
        self._sends_shares = False

    def all_gather(self, out: Tensor, block: Tensor, group: object) -> None:
        # If ranks merge shares of the tensors, they gather merged rows, which have no index.
        self._fill(out.view(-1, *block.shape), block, not self._sends_shares)

    def all_to_all(self, out: Tensor, blocks: Tensor, group: object) -> None:
        self._sends_shares = True
        self._fill(out, blocks[0], True)

    def _fill(self, out: Tensor, block: Tensor, has_indices: bool) -> None:
        """Receive `block` from every rank; word 0 of its rows but the first one is an index."""
        begin = _CPU()
        out.copy_(block)
        if has_indices:
            indices = out[:, 1:, 0]
            indices += torch.arange(len(out))[:, None] * (indices >= 0)
        self.collectives += 1
        self.received += (len(out) - 1) * block.nbytes
        self.seconds += _CPU() - begin


def simulated_cost(tensors: int, ranks: int) -> tuple[int, int, float]:
    """Return the collectives, received bytes and seconds of work of one exchange, for one rank.

    The work is the additional CPU time compared with a call in a group of one rank.
    """
    _, alone = _simulated_call(tensors, 1)
    simulated, seconds = _simulated_call(tensors, ranks)
    return simulated.collectives, simulated.received, seconds - alone


def _simulated_call(tensors: int, ranks: int) -> tuple[SimulatedRanks, float]:
    """Return the simulation of one call, and the call's CPU time without it."""
    source = _shards(tensors, ranks)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    seconds = []
    for _ in range(1 + _REPEAT):
        simulated = SimulatedRanks()
        with (
            mock.patch.object(dist, "all_gather_into_tensor", simulated.all_gather),
            mock.patch.object(dist, "all_gather_single", simulated.all_gather, create=True),
            mock.patch.object(dist, "all_to_all_single", simulated.all_to_all),
        ):
            seconds.append(_seconds(source, _CPU) - simulated.seconds)
    dist.destroy_process_group()
    return simulated, min(seconds[1:])  # in the first call, ranks also agree on the names


def _shards(tensors: int, ranks: int) -> dict[str, paramstats.LocalShard]:
    """Return the first of `ranks` equal shards of parameters and their gradients."""
    shards = {}
    for i in range(tensors // 2):
        p = nn.Parameter(torch.randn(_ELEMENTS))
        p.grad = torch.randn(_ELEMENTS)
        shards[f"layers.{i}.weight"] = paramstats.LocalShard(p, 0, _ELEMENTS * ranks)
    return shards


def main() -> None:
    torch.set_num_threads(1)
    tensors = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    print(hardware.describe("cpu"))
    milliseconds = 1e3 * real_seconds(_PROCESSES, tensors)
    print(f"{tensors:,} tensors (half of them gradients), {_PROCESSES} processes with gloo:")
    print(f"{milliseconds:.1f} ms per call")
    rows = []
    for ranks in _RANKS:
        collectives, nbytes, work = simulated_cost(tensors, ranks)
        network = collectives * _LATENCY + nbytes / _BYTES_PER_SECOND
        times = f"{work * 1e3:.1f} ms", f"{network * 1e3:.2f} ms"
        rows.append((f"{ranks:,}", str(collectives), f"{nbytes / 1e6:.2f} MB", *times))
    head = ("ranks", "collectives", "received per rank", "work, measured", "network, computed")
    print(blocks.table(head, rows, right=range(len(head))))


if __name__ == "__main__":
    main()
