"""Train a small network on scikit-learn's digits; print its statistics and the speed of summarize.

The network has a lazy layer and a layer that is used twice, because both are easy to get wrong when
statistics are collected by hand.
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


class SharedNet(nn.Module):
    """Classify 8 x 8 images; `hidden` and `hidden_again` are the same layer."""

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


def item_loop(model: nn.Module) -> dict[str, float]:
    """Compute the same statistics with the usual loop: four `.item()` calls per tensor.

    The keys are those of `Summary.scalars(totals=False)`.
    """
    scalars = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for kind, x in (("param", parameter), ("grad", parameter.grad)):
                if x is not None:
                    scalars[f"{kind}_mean/{name}"] = x.mean().item()
                    scalars[f"{kind}_std/{name}"] = x.std().item()
                    scalars[f"{kind}_norm/{name}"] = x.norm().item()
                    scalars[f"{kind}_zero_fraction/{name}"] = (x == 0).float().mean().item()
    return scalars


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Train with Adam; show loss and gradient norm of every step in a progress bar."""
    from tqdm import tqdm

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batches = [batch for _ in range(epochs) for batch in torch.randperm(len(images)).chunk(15)]
    show_bar = sys.stderr.isatty()  # a log file would contain 150 bars
    with tqdm(batches, "training", unit="step", disable=not show_bar) as progress:
        for batch in progress:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            norm = paramstats.summarize(model).total.grad.norm  # type: ignore[union-attr]
            optimizer.step()
            progress.set_postfix(loss=f"{loss.item():.3f}", grad_norm=f"{norm:.3f}", refresh=False)


def compare(model: nn.Module) -> bool:
    """Print the largest difference from the loop and the time of both; return True if they agree.

    Differences of a mean or std are relative to the tensor's root mean square.
    """
    summary = paramstats.summarize(model)
    scalars, expected = summary.scalars(totals=False), item_loop(model)
    assert scalars.keys() == expected.keys()
    worst = 0.0
    for key, value in scalars.items():
        kind, name = key.split("/")
        entry = summary[name].grad if kind.startswith("grad_") else summary[name]
        size = {"norm": entry.norm, "zero_fraction": 1.0}.get(kind.partition("_")[2], entry.rms)
        worst = max(worst, abs(value - expected[key]) / (size or 1.0))

    call, with_scalars, loop = median_seconds(
        lambda: paramstats.summarize(model),
        lambda: paramstats.summarize(model).scalars(),
        lambda: item_loop(model),
    )
    print(f"Largest relative difference from the .item() loop: {worst:.1e}")
    print(f"Time of the .item() loop: {loop * 1e6:.1f} us")
    print(f"Time of summarize: {call * 1e6:.1f} us, {loop / call:.0f} times as fast")
    print(
        f"Time of summarize and scalars(): {with_scalars * 1e6:.1f} us, "
        f"{loop / with_scalars:.0f} times as fast"
    )
    return worst < 1e-5


def median_seconds(*functions: Callable[[], object]) -> list[float]:
    """Time 30 rounds of 10 calls of each function; alternate, so that all see the same load."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(30):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            for _ in range(10):
                function()
            seconds.append((time.perf_counter() - start) / 10)
    return [statistics.median(seconds) for seconds in times]


def main() -> int:
    """Run the demo and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10, help="passes over the 1,797 images")
    epochs = parser.parse_args().epochs
    try:
        import tqdm  # noqa: F401 - `train` uses it
        from sklearn.datasets import load_digits
    except ImportError as error:
        print(f"{error}. The demo needs: pip install scikit-learn tqdm", file=sys.stderr)
        return 2

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    model = SharedNet()

    print(paramstats.backend(), end="\n\n")
    print("Before the first batch, the lazy layer has no shape:\n")
    print(paramstats.summarize(model), end="\n\n")

    model(images[:2])  # the lazy layer gets its shape
    train(model, images, labels, epochs)
    accuracy = (model(images).argmax(1) == labels).float().mean().item()

    print(f"Epochs: {epochs}; digits: {len(images)}; classified correctly: {accuracy:.1%}\n")
    summary = paramstats.summarize(model)
    print(summary, end="\n\n")
    print(f"Health check: {summary.findings()}", end="\n\n")
    if compare(model):
        return 0
    print("The statistics differ by more than 1e-5. Please report this.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
