"""Draw the pictures of docs/history.md from trainings on digits.

    python -m docs.pictures

The lines show the mean of a shared layer's weight and of its gradient. The heat map shows the
gradient norms of a transformer of 100 parameters. One of its layers has no gradients for 40 steps,
and one gradient contains a NaN. The distributions are those of the shared layer's weight and of its
gradient. On one machine, the files are the same in every run.
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
_WIDTH = {"history-lines": 1350, "history-heatmap": 1000, "history-distribution": 1000}
"""In pixels. The files stay below 200 KB and are sharp when shown 900 pixels wide."""


class RowReader(nn.Module):
    """A transformer that reads an image of 8 x 8 pixels as eight tokens, one per row."""

    def __init__(self, layers: int = 8, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.view(-1, 8, 8))
        return self.head(self.encoder(tokens).mean(1))  # type: ignore[no-any-return]


def train(
    model: nn.Module,
    every: int = 1,
    after_backward: Callable[[int], None] = lambda step: None,
    distribution: str | bool = False,
) -> paramstats.History:
    """Train for 300 steps and record every `every`-th; `after_backward` may change gradients."""
    history = paramstats.History()
    batches = digits()
    images, _ = next(batches)
    model(images)  # lazy layers get their shape
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(300):
        images, labels = next(batches)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        after_backward(step)
        if step % every == 0:
            history.append(step, paramstats.summarize(model, distribution=distribution))
        for p in model.parameters():
            if p.grad is not None and not p.grad.isfinite().all():
                p.grad = None  # the optimizer skips this parameter
        optimizer.step()
    return history


def digits() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of images and labels without end."""
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    while True:
        for batch in torch.randperm(len(images)).chunk(15):
            yield images[batch], labels[batch]


def draw_lines() -> Figure:
    history = train(SharedNet())
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    history.plot("hidden.weight", stat="mean", kind="param", ax=above)
    history.plot("hidden.weight", stat="mean", kind="grad", ax=below)
    above.set_xlabel("")
    return figure


def draw_heatmap() -> Figure:
    model = RowReader()

    def damage(step: int) -> None:
        if 120 <= step < 160:
            for p in model.encoder.layers[3].parameters():
                p.grad = None
        if step == 219:
            model.encoder.layers[5].linear1.weight.grad[0, 0] = math.nan

    return train(model, 3, damage).heatmap()


def draw_distributions() -> Figure:
    history = train(SharedNet(), distribution="hidden.weight")
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    history.distribution("hidden.weight", ax=above)
    history.distribution("hidden.weight", kind="grad", ax=below)
    above.set_xlabel("")
    return figure


def main() -> None:
    torch.set_num_threads(1)
    for draw, (name, width) in zip(
        (draw_lines, draw_heatmap, draw_distributions), _WIDTH.items(), strict=True
    ):
        torch.manual_seed(0)
        path = _HERE / f"{name}.png"
        draw().savefig(path, dpi=width / 9, metadata={"Software": None})
        print(f"{path}: {path.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
