"""What is trained, real models on real or random data, and how its steps are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benches.step_cost.tools import Look


class Training:
    """A model, its optimizer and the loss of its next batch."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[], torch.Tensor],
    ) -> None:
        self.model = model
        self._optimizer = optimizer
        self._loss = loss

    def backward(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._loss().backward()

    def step(self, look: Look) -> None:
        self.backward()
        look()
        self._optimizer.step()


@dataclass(frozen=True)
class Work:
    """A training, and how it is timed."""

    name: str
    title: str
    build: Callable[[], Training]
    turns: int
    steps: int
    """Timed in each turn, after as many that are not as `first` says."""
    first: int


_TOKENS = 128


def _gpt2() -> Training:
    """AdamW as Hugging Face's trainer has it, fused: its step is the shorter one to add to."""
    import transformers

    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(model.config.vocab_size, (1, _TOKENS))
    return Training(
        model, optimizer, lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss
    )


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.around: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.around = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.around(x))


def _resnet() -> Training:
    """ResNet-18 as it is made for CIFAR's 32 x 32 pixels, on random ones."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    inputs = 64
    for outputs in (64, 128, 256, 512):
        layers += [Block(inputs, outputs, 1 if outputs == 64 else 2), Block(outputs, outputs, 1)]
        inputs = outputs
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    return Training(model, optimizer, lambda: nn.functional.cross_entropy(model(images), labels))


def _mlp() -> Training:
    """On scikit-learn's digits, 64 at a time."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def loss() -> torch.Tensor:
        batch = torch.randint(len(labels), (64,))
        return nn.functional.cross_entropy(model(pixels[batch]), labels[batch])

    return Training(model, optimizer, loss)


WORKS = (
    Work("gpt2", "GPT-2, 124 M parameters, 128 tokens", _gpt2, turns=9, steps=1, first=1),
    Work("resnet", "ResNet-18, 32 images of 32 x 32", _resnet, turns=11, steps=1, first=1),
    Work("mlp", "MLP of 6 parameters, 64 digits", _mlp, turns=15, steps=50, first=5),
)
