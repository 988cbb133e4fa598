"""Draws the pictures of a history in docs: the same bytes every time, on one machine.

    python -m docs.pictures

docs/history-lines.png: the mean of a shared layer's weight and of its gradient, over training on
digits. docs/history-heatmap.png: the gradients of a transformer of 100 parameters that reads the
digits row by row, one layer frozen for a while, and one gradient lost to NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import paramstats
from examples.demo import SharedNet

_HERE = Path(__file__).parent
_WIDTH = {"history-lines": 1350, "history-heatmap": 1000}
"""Pixels: sharp at 900 and below 200 KB."""


class RowReader(nn.Module):
    """A transformer to which a digit is eight tokens of eight pixels."""

    def __init__(self, layers: int = 8, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.view(-1, 8, 8))
        return self.head(self.encoder(tokens).mean(1))  # type: ignore[no-any-return]


def trained(
    model: nn.Module, every: int = 1, event: Callable[[int], None] = lambda step: None
) -> paramstats.History:
    """The history of a training on digits, an entry each `every` steps; `event` may do something to
    the model after backward."""
    history = paramstats.History()
    batches = _batches()
    images, _ = next(batches)
    model(images)  # lazy layers take their shape
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(300):
        images, labels = next(batches)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        event(step)
        if step % every == 0:
            history.append(step, paramstats.summarize(model))
        for p in model.parameters():
            if p.grad is not None and not p.grad.isfinite().all():
                p.grad = None  # this step leaves it as it is
        optimizer.step()
    return history


def _batches() -> Iterator[tuple[Tensor, Tensor]]:
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    while True:
        for batch in torch.randperm(len(images)).chunk(15):
            yield images[batch], labels[batch]


def draw_lines() -> Figure:
    history = trained(SharedNet())
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    history.plot("hidden.weight", "mean", "param", ax=above)
    history.plot("hidden.weight", "mean", "grad", ax=below)
    above.set_xlabel("")
    return figure


def draw_heatmap() -> Figure:
    model = RowReader()

    def event(step: int) -> None:
        if 120 <= step < 160:
            for p in model.encoder.layers[3].parameters():
                p.grad = None
        if step == 219:
            model.encoder.layers[5].linear1.weight.grad[0, 0] = math.nan

    return trained(model, 3, event).heatmap()


def main() -> None:
    torch.set_num_threads(1)
    for name, draw in (("history-lines", draw_lines), ("history-heatmap", draw_heatmap)):
        torch.manual_seed(0)
        path = _HERE / f"{name}.png"
        draw().savefig(path, dpi=_WIDTH[name] / 9, metadata={"Software": None})
        print(f"{path}: {path.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
