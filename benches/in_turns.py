"""paramstats against the read-only loop and the `.item()` loop, call by call in turns.

    python -m benches.in_turns        half a minute

The suite measures one contestant after the other, and a shared machine's memory may be twice as
fast for one as for the next. Here each ratio is of neighbouring calls, and the median is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import paramstats
from benches import hardware, models
from benches.contestants import item_loop_no_grad
from benches.read_only import ReadOnly

_BEST_OF = 3


def ratio(other: Callable[[], object], ours: Callable[[], object], turns: int) -> str:
    """How many times as long as `ours` `other` takes, and the middle half of the ratios."""
    ratios = [_seconds(other) / _seconds(ours) for _ in range(turns)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{statistics.median(ratios):.2f} times as long (middle half {low:.2f} to {high:.2f})"


def _seconds(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_BEST_OF):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


def main() -> None:
    parser = argparse.ArgumentParser("python -m benches.in_turns", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.parse_args()
    print(paramstats.backend(), hardware.describe("cpu")["hardware"], sep="\n")
    gpt2 = next(model for model in models.MODELS if model.name == "gpt2")
    model = models.build(gpt2, torch.device("cpu"))
    read_only = ReadOnly(list(models.tensors(model).values()), torch.get_num_threads())

    def call() -> object:
        return paramstats.summarize(model)

    mlp = models.build(models.MODELS[0], torch.device("cpu"))
    p = next(mlp.parameters())
    one_mean = ratio(lambda: p.mean().item(), lambda: paramstats.summarize(mlp), 400)
    print("What takes, compared with paramstats' call for the same:")
    print(f"{models.MODELS[0].title}, one p.mean().item(): {one_mean}")
    loop = ratio(lambda: item_loop_no_grad(mlp), lambda: paramstats.summarize(mlp), 100)
    print(f"{models.MODELS[0].title}, .item() loop under no_grad: {loop}")
    print(f"GPT-2, read-only loop: {ratio(read_only, call, 40)}")
    print(f"GPT-2, .item() loop under no_grad: {ratio(lambda: item_loop_no_grad(model), call, 5)}")
    tensor = torch.empty(1 << 28).normal_()
    for threads in range(1, min(2, hardware.cores()) + 1):
        torch.set_num_threads(threads)
        read_only = ReadOnly([tensor], threads)
        found = ratio(read_only, lambda: paramstats.summarize({"x": tensor}), 12)
        print(f"1 GiB of float32, {threads} threads, read-only loop: {found}")


if __name__ == "__main__":
    main()
