"""Models, data and trainings for the tests of the health check."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from paramstats import FindingCode, Severity, Summary, summarize


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: for networks this small, more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Images of 64 pixels in [0, 1], and their labels."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    data = datasets.load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    ).to(dtype)


def deep(
    layers: int,
    activation: Callable[[], nn.Module] = nn.ReLU,
    std: float | None = None,
    bias: bool = True,
) -> nn.Sequential:
    """Return a perceptron of so many layers, whose hidden weights have this std if given."""
    torch.manual_seed(0)
    hidden = [nn.Linear(64, 64, bias=bias) for _ in range(layers - 1)]
    for layer in hidden if std is not None else ():
        nn.init.normal_(layer.weight, std=std)
    return nn.Sequential(
        *[module for layer in hidden for module in (layer, activation())], nn.Linear(64, 10)
    )


def train(
    model: nn.Module,
    digits: tuple[Tensor, Tensor],
    steps: int,
    optimizer: torch.optim.Optimizer | None = None,
    loss_of: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    at_step: Callable[[int, Tensor], None] = lambda step, images: None,
) -> list[Summary]:
    """Train and return a summary after each backward pass; `at_step` may modify the batch."""
    images, labels = digits
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    dtype = next(model.parameters()).dtype
    summaries = []
    for step in range(steps):
        rows = torch.randint(0, len(images), (64,))
        batch = images[rows].to(dtype)
        at_step(step, batch)
        optimizer.zero_grad()
        loss_of(model(batch), labels[rows]).backward()
        summaries.append(summarize(model))
        optimizer.step()
    return summaries


def found(summary: Summary, severity: Severity = Severity.WARNING) -> dict[FindingCode, list[str]]:
    """Return the names of the tensors with each finding."""
    out: dict[FindingCode, list[str]] = {}
    for finding in summary.findings().at_least(severity):
        out.setdefault(finding.code, []).append(finding.name)
    return out


class Layer(nn.Module):
    """A module with these members, and with `call(module, x)` as its forward function."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], **members: object) -> None:
        super().__init__()
        self.call = call
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def convolutional() -> nn.Module:
    def layer(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    last = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 16, 10)]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layer(1, 8), *layer(8, 16), *last)


def recurrent() -> nn.Module:
    return Layer(
        lambda self, x: self.head(self.lstm(x.view(-1, 8, 8))[0][:, -1]),
        lstm=nn.LSTM(8, 32, num_layers=2, batch_first=True),
        head=nn.Linear(32, 10),
    )


def transformer() -> nn.Module:
    """A small BERT whose tokens are every second pixel."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 17, "hidden_size": 32, "intermediate_size": 64, "num_labels": 10}
    config = transformers.BertConfig(num_hidden_layers=3, num_attention_heads=2, **sizes)
    bert = transformers.BertForSequenceClassification(config)
    return Layer(lambda self, x: self.bert(input_ids=(x[:, ::2] * 16).long()).logits, bert=bert)


def lora() -> nn.Module:
    """A frozen layer with a low-rank update. B is zero at first, so that A has no gradient."""
    return Layer(
        lambda self, x: self.frozen(x) + x @ self.lora_a.T @ self.lora_b.T,
        frozen=nn.Linear(64, 64).requires_grad_(False),
        lora_a=nn.Parameter(torch.randn(4, 64) / 8),
        lora_b=nn.Parameter(torch.zeros(64, 4)),
    )


def zero_residual() -> nn.Module:
    """A residual branch that outputs zero at first: its last weight is initialized to zero."""
    layer = Layer(
        lambda self, x: x + self.norm(self.second(torch.relu(self.first(x)))),
        first=nn.Linear(64, 64),
        second=nn.Linear(64, 64),
        norm=nn.BatchNorm1d(64),
    )
    nn.init.zeros_(layer.norm.weight)
    return layer


def zero_positions() -> nn.Module:
    """Position tables that are initialized to zero, and a normalization over two dimensions."""
    return Layer(
        lambda self, x: self.norm(x.view(-1, 8, 8) + self.pos_embed + self.bias_table).flatten(1),
        pos_embed=nn.Parameter(torch.zeros(1, 8, 8)),
        bias_table=nn.Parameter(torch.zeros(8, 8)),
        norm=nn.LayerNorm((8, 8)),
    )


def embedding() -> nn.Module:
    """An embedding of pixels whose row for padding is zero."""
    return Layer(
        lambda self, x: self.embedding((16 * x).long()).flatten(1),
        embedding=nn.Embedding(17, 1, padding_idx=0),
    )


def weight_norm() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
