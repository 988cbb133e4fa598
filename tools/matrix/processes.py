"""Rows about worker processes and shared memory."""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_convert

import paramstats
from paramstats._core import backend as backends
from tests import oracle
from tools.matrix.checker import Checker
from tools.matrix.rows import row

LARGE = 600_000  # elements; more than a call reads on one thread
SECONDS = 120  # a row that takes longer hangs


def large(seed: int) -> torch.Tensor:
    return torch.randn(LARGE, generator=torch.Generator().manual_seed(seed))


class Summaries(Dataset):
    """A worker makes a summary of a large tensor for each item."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> paramstats.Summary:
        tensor = large(index)
        return paramstats.summarize({"x": tensor, "z": torch.view_as_complex(tensor.view(-1, 2))})


def first(items: list[Any]) -> Any:
    return items[0]


class InitWorker:
    """Sets the backend and the number of threads of a worker."""

    def __init__(self, backend: str, threads: int) -> None:
        self.backend, self.threads = backend, threads

    def __call__(self, _: int) -> None:
        backends._active = backends.choose(self.backend)
        torch.set_num_threads(self.threads)


@row("DataLoader workers by fork, spawn and forkserver")
def workers(check: Checker) -> str:
    def compare() -> int:
        paramstats.summarize({"x": large(0)})  # starts torch's threads before the fork
        compared = 0
        for method in multiprocessing.get_all_start_methods():
            for threads in (1, 2) if method == "fork" else (1,):
                loader = DataLoader(
                    Summaries(), batch_size=1, num_workers=2, collate_fn=first, timeout=SECONDS,
                    worker_init_fn=InitWorker(backends.active().name, threads),
                    multiprocessing_context=method,
                )  # fmt: skip
                for index, summary in enumerate(loader):
                    oracle.check(summary["x"], large(index))
                    assert abs(summary["z"].norm - summary["x"].norm) <= 1e-6 * summary["x"].norm
                    compared += 2
        return compared

    check.each(compare)
    assert type(default_convert(paramstats.summarize({"x": large(0)}))) is dict
    return (
        "also in workers that call `torch.set_num_threads(2)`. With `batch_size=None` torch's "
        "`default_convert` turns a `Summary` into a dict: return `.to_dict()` or `.scalars()`"
    )


def hogwild(_: int, model: torch.nn.Module, backend: str) -> None:
    backends._active = backends.choose(backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 64)).square().mean().backward()
        assert paramstats.summarize(model).total.grad.norm > 0
        optimizer.step()


@row("Hogwild: processes train one model in shared memory")
def shared_memory(check: Checker) -> None:
    import torch.multiprocessing as mp

    def compare() -> int:
        model = torch.nn.Linear(64, 32).share_memory()
        mp.spawn(hogwild, (model, backends.active().name), nprocs=2)
        oracle.check(paramstats.summarize(model)["weight"], model.weight)
        return 1

    check.each(compare)
