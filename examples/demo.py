"""Trains a small network on scikit-learn's digits and shows what its parameters are doing.

The network has what people trip over by hand: a lazy layer, and a layer shared in two places.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import paramstats

ROUNDS = 30
"""Timed calls of each contestant, taken in turns; the median is printed."""


class SharedNet(nn.Module):
    """A classifier of 8 x 8 images that passes through the same hidden layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.LazyLinear(64)
        self.hidden = nn.Linear(64, 64)
        self.hidden_again = self.hidden
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.hidden(x))
        x = torch.relu(self.hidden_again(x))
        return self.head(x)  # type: ignore[no-any-return]


def item_loop(model: nn.Module) -> dict[str, tuple[float, ...]]:
    """What summarize replaces: four waits for every parameter and every gradient."""

    def statistics(x: Tensor) -> tuple[float, ...]:
        return x.mean().item(), x.std().item(), x.norm().item(), (x == 0).float().mean().item()

    log = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            log[name] = statistics(p)
            if p.grad is not None:
                log[name + ".grad"] = statistics(p.grad)
    return log


def run(epochs: int) -> int:
    """Trains, prints the tables, compares with the loop; the process's exit status."""
    try:
        from sklearn.datasets import load_digits
        from tqdm import tqdm
    except ImportError:
        print(
            "The demo needs scikit-learn and tqdm: pip install scikit-learn tqdm", file=sys.stderr
        )
        return 2

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    model = SharedNet()

    print(paramstats.backend(), end="\n\n")
    print("Before the first batch: the lazy layer has no shape yet\n")
    print(paramstats.summarize(model), end="\n\n")

    model(images[:2])  # the lazy layer takes its shape
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with tqdm(
        total=epochs * 15,
        desc="training",
        unit="step",
        file=sys.stderr,
        disable=not sys.stderr.isatty(),  # a log would hold 150 bars
    ) as progress:
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).chunk(15):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
                loss.backward()
                norm = paramstats.summarize(model).total.grad.norm  # type: ignore[union-attr]
                optimizer.step()
                progress.set_postfix(
                    loss=f"{loss.item():.3f}", grad_norm=f"{norm:.3f}", refresh=False
                )
                progress.update()
    accuracy = (model(images).argmax(1) == labels).float().mean().item()

    summary = paramstats.summarize(model)
    print(f"\nEpochs: {epochs}; digits: {len(images)}, of which {accuracy:.1%} were learnt\n")
    print(summary, end="\n\n")
    print(f"Health check: {summary.findings()}", end="\n\n")
    return compare(model, summary)


def compare(model: nn.Module, summary: paramstats.Summary) -> int:
    """Agreement with the loop, and the time of both."""
    worst = worst_difference(summary, item_loop(model))
    call, scalars, loop = medians(
        lambda: paramstats.summarize(model),
        lambda: paramstats.summarize(model).scalars(),
        lambda: item_loop(model),
    )
    agree = worst < 1e-5
    print(f"Agreement with the .item() loop: largest difference {worst:.1e} of a tensor's rms")
    print(
        f"Time: summarize {call * 1e6:.1f} us, .item() loop {loop * 1e6:.1f} us: "
        f"{loop / call:.0f} times as fast; with a dict of them for a logger "
        f"(.scalars()) {scalars * 1e6:.1f} us: {loop / scalars:.0f} times as fast"
    )
    if not agree:
        print("The statistics do not agree: please report this.", file=sys.stderr)
    return 0 if agree else 1


def worst_difference(summary: paramstats.Summary, log: dict[str, tuple[float, ...]]) -> float:
    """The largest difference of a statistic, as a share of its tensor's root mean square."""
    worst = 0.0
    for name, entry in summary.items():
        for key, stats in ((name, entry), (name + ".grad", entry.grad)):
            if stats is None:
                continue
            mean, std, norm, zeros = log[key]
            unit = stats.rms or 1.0
            differences = (
                abs(stats.mean - mean) / unit,
                abs(stats.std - std) / unit,
                abs(stats.norm - norm) / (stats.norm or 1.0),
                abs(stats.zero_fraction - zeros),
            )
            worst = max(worst, *differences)
    return worst


def medians(*contestants: Callable[[], object]) -> list[float]:
    """The median seconds of a call of each, taken in turns, ten calls at a time."""
    calls = 10
    times: list[list[float]] = [[] for _ in contestants]
    for _ in range(ROUNDS):
        for contestant, own in zip(contestants, times, strict=True):
            start = time.perf_counter()
            for _ in range(calls):
                contestant()
            own.append((time.perf_counter() - start) / calls)
    return [statistics.median(own) for own in times]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10, help="passes over the digits")
    sys.exit(run(parser.parse_args().epochs))
