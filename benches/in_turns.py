"""Times paramstats, the read-only loop and the `.item()` loop in alternating calls.

    python -m benches.in_turns        half a minute

The memory bandwidth of a shared machine may double within minutes. The benchmarks in pytest time
one contestant after the other; here each ratio compares two neighbouring calls.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import paramstats
from benches import hardware, models
from benches.contestants import item_loop_no_grad
from benches.read_only import ReadOnly

_BEST_OF = 3


def ratio(other: Callable[[], object], ours: Callable[[], object], turns: int) -> str:
    """Describe how many times longer `other` takes than `ours`."""
    ratios = [_seconds(other) / _seconds(ours) for _ in range(turns)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return (
        f"{statistics.median(ratios):.2f} times (middle half of the turns {low:.2f} to {high:.2f})"
    )


def _seconds(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_BEST_OF):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


def main() -> None:
    print(paramstats.backend(), hardware.describe("cpu")["hardware"], sep="\n")
    print("Time of another call, as a multiple of the time of paramstats.summarize:")
    cpu = torch.device("cpu")
    mlp = models.by_name("seed_mlp", cpu)
    p = next(mlp.parameters())

    def print_ratio(title: str, other: Callable[[], object], source: Any, turns: int) -> None:
        print(f"{title}: {ratio(other, lambda: paramstats.summarize(source), turns)}", flush=True)

    print_ratio("MLP of 4 parameters, one p.mean().item()", lambda: p.mean().item(), mlp, 400)
    print_ratio("MLP of 4 parameters, .item() loop", lambda: item_loop_no_grad(mlp), mlp, 100)
    gpt2 = models.by_name("gpt2", cpu)
    read_only = ReadOnly(list(models.tensors(gpt2).values()), torch.get_num_threads())
    print_ratio("GPT-2, read-only loop", read_only, gpt2, 40)
    print_ratio("GPT-2, .item() loop", lambda: item_loop_no_grad(gpt2), gpt2, 5)
    tensor = torch.empty(1 << 28).normal_()
    for threads in range(1, min(2, hardware.cores()) + 1):
        torch.set_num_threads(threads)
        title = f"1 GiB of float32, {threads} threads, read-only loop"
        print_ratio(title, ReadOnly([tensor], threads), {"x": tensor}, 12)


if __name__ == "__main__":
    main()
