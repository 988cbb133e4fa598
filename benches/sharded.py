"""What an exchange costs from 8 to 4,096 processes: collectives, bytes and the joining of states.

    python -m benches.sharded
    python -m benches.sharded --tensors 10000 --ranks 1024

First in real processes on this machine. Beyond, one process stands for all: it runs paramstats' own
exchange for rank 0, and what the others would have sent is made from what it sends itself. So
collectives, bytes and the time that a process works are measured; the network's time is arithmetic,
from a bandwidth and a latency that are stated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.spawn import spawn

import paramstats
from benches import hardware
from paramstats._core.backend import active
from paramstats._core.layout import Layout
from paramstats._sharded.collectives import Processes
from paramstats._sharded.exchange import ALL_TO_ALL_FROM, Group, Result
from paramstats._sharded.offer import FailedOffer, Offer
from paramstats._sharded.pieces import held

_RANKS = (8, 16, 64, 256, 1024, 4096)
_ELEMENTS = 16
_REPEAT = 5
_REAL_REPEAT = 15
_LATENCY = 20e-6
"""Seconds for a message to be under way, assumed."""
_BYTES_PER_SECOND = 10e9
"""That reach one process, assumed: a tenth of what 8 GPUs share with 8 x 400 Gbit/s."""


class OneForAll(Processes):
    """One process in the place of all, as if the others had its keys' successors and its states."""

    def __init__(self, ranks: int) -> None:
        super().__init__(None)
        self.size = ranks
        self.ranks = list(range(ranks))
        self.collectives = 0
        self.received = 0
        self.seconds = 0.0

    def all_gather(self, block: Tensor) -> Tensor:
        begin = time.perf_counter()
        out = block.repeat(self.size, 1, 1)
        if self.size < ALL_TO_ALL_FROM:  # else they are joined, and have no keys
            _as_of_others(out)
        return self._received(out, begin)

    def all_to_all(self, blocks: Tensor) -> Tensor:
        begin = time.perf_counter()
        out = blocks[:1].repeat(self.size, 1, 1)
        _as_of_others(out)
        return self._received(out, begin)

    def _received(self, out: Tensor, begin: float) -> Tensor:
        self.collectives += 1
        self.received += (len(out) - 1) * out[0].nbytes
        self.seconds += time.perf_counter() - begin
        return out


def _as_of_others(out: Tensor) -> None:
    keys = out[:, 1:, 0]
    keys += torch.arange(len(out))[:, None] * (keys >= 0)


def measured(tensors: int, ranks: int) -> dict[str, float]:
    """Of one exchange for half as many parameters as `tensors`, and their gradients."""
    parameters = {}
    for i in range(tensors // 2):
        p = nn.Parameter(torch.randn(_ELEMENTS))
        p.grad = torch.randn(_ELEMENTS)
        parameters[f"layers.{i}.weight"] = paramstats.LocalShard(p, 0, _ELEMENTS * ranks)
    rows = list(parameters.values())
    names = tuple(parameters)
    layout = Layout.of(names, ((),) * len(names), len(names), rows)  # type: ignore[arg-type]
    offer = Offer(active(), layout, rows, held(rows, True, {}), True)
    processes = OneForAll(ranks)
    group = Group(processes)
    group.exchange(offer)  # the first time, names are agreed on
    seconds = []
    for _ in range(_REPEAT):
        processes.collectives, processes.received, processes.seconds = 0, 0, 0.0
        begin = time.perf_counter()
        result = group.exchange(offer)
        seconds.append(time.perf_counter() - begin - processes.seconds)
        assert len(result.table) == tensors // 2 * 2 * 72 and not result.diverged
    network = processes.collectives * _LATENCY + processes.received / _BYTES_PER_SECOND
    return {
        "collectives": processes.collectives,
        "received": processes.received,
        "work_s": statistics.median(seconds),
        "network_s": network,
    }


def on_this_machine(processes: int, tensors: int) -> tuple[float, float]:
    """Seconds of an exchange and of the whole call, medians, of a model of DTensors in real
    processes over gloo, which share the cores that are here."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_measure, (processes, tensors, folder), nprocs=processes)
        exchange, call = json.loads((Path(folder) / "seconds").read_text())
    return exchange, call


def _measure(rank: int, processes: int, tensors: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))

    def sharded() -> DTensor:
        return DTensor.from_local(torch.randn(4, _ELEMENTS // 4), mesh, [Shard(0)])

    model = nn.ParameterList(nn.Parameter(sharded()) for _ in range(tensors // 2))
    for p in model:
        p.grad = sharded()
    offered: list[float] = []
    calls: list[float] = []
    plain = Group.exchange

    def timed(self: Group, offer: Offer | FailedOffer) -> Result:
        dist.barrier()
        begin = time.perf_counter()
        result = plain(self, offer)
        offered.append(time.perf_counter() - begin)
        return result

    for exchange, seconds in ((timed, None), (plain, calls)):
        Group.exchange = exchange  # type: ignore[method-assign]
        for _ in range(_REAL_REPEAT):
            dist.barrier()
            begin = time.perf_counter()
            paramstats.summarize(model)
            if seconds is not None:
                seconds.append(time.perf_counter() - begin)
    if rank == 0:
        medians = [statistics.median(offered), statistics.median(calls)]
        (Path(folder) / "seconds").write_text(json.dumps(medians))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser("python -m benches.sharded", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tensors", type=int, default=10_000, help="default %(default)s")
    parser.add_argument("--ranks", type=int, nargs="*", default=_RANKS)
    parser.add_argument("--processes", type=int, default=4, help="real ones; default %(default)s")
    options = parser.parse_args()
    print(hardware.describe("cpu"))
    print(f"{options.tensors:,} tensors, gradients among them; times of one process")
    exchange, call = on_this_machine(options.processes, options.tensors)
    print(
        f"{options.processes} real processes over gloo: {exchange * 1e3:.1f} ms for the exchange, "
        f"{call * 1e3:.1f} ms for the call"
    )
    print("| processes | collectives | received by each | its work, measured | network, reckoned |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for ranks in options.ranks:
        m = measured(options.tensors, ranks)
        print(
            f"| {ranks:,} | {m['collectives']:.0f} | {m['received'] / 1e6:.2f} MB "
            f"| {m['work_s'] * 1e3:.1f} ms | {m['network_s'] * 1e3:.2f} ms |"
        )
    print(
        f"Reckoned: {_LATENCY * 1e6:.0f} us a collective and {_BYTES_PER_SECOND / 1e9:.0f} GB/s, "
        f"both assumed."
    )


if __name__ == "__main__":
    main()
